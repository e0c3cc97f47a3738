"""Names of the classes of COCO, by the numbers that its files hold."""

from __future__ import annotations

_THINGS = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
street sign, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, hat, backpack, umbrella, shoe, eye glasses, handbag, tie, suitcase, frisbee, skis,
snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket,
bottle, plate, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, mirror, dining
table, window, desk, toilet, door, tv, laptop, mouse, remote, keyboard, cell phone, microwave,
oven, toaster, sink, refrigerator, blender, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush, hair brush
"""
_STUFF = """
banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet,
ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt,
door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog,
food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat,
metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, pillow, plant-other,
plastic, platform, playingfield, railing, railroad, river, road, rock, roof, rug, salad, sand,
sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, straw, structural-other,
table, tent, textile-other, towel, tree, vegetable, wall-brick, wall-concrete, wall-other,
wall-panel, wall-stone, wall-tile, wall-wood, water-other, waterdrops, window-blind, window-other,
wood
"""
_MERGED = """
tree, fence, ceiling, sky-other, cabinet, table, floor-other, pavement, mountain, grass, dirt,
paper, food-other, building-other, rock, wall-other, rug
"""


def _split(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


COCO_STUFF = (*_split(_THINGS), *_split(_STUFF))
"""The 182 classes of the stuffthingmaps of COCO-Stuff: a class has its category id less 1.

91 things, of which 11 never occur (street sign, hat, shoe, eye glasses, plate, mirror, window,
desk, door, blender, hair brush), then 91 kinds of stuff.

Source:
    https://github.com/nightrome/cocostuff, labels.txt and "Caffe-compatible stuff-thing maps".
"""

COCO_PANOPTIC = ("void", *COCO_STUFF, "other", *(f"{name}-merged" for name in _split(_MERGED)))
"""The category ids of COCO panoptic, 0 to 200: those of COCO-Stuff, then stuff that was merged.

133 of them occur; an id that was merged into another keeps the name that it has in COCO-Stuff.

Source:
    https://github.com/cocodataset/panopticapi, panoptic_coco_categories.json.
"""
