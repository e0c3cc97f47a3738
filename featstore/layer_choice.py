"""Which blocks of a backbone to read: spread over its depth, or its last ones.

Numbers are 0-based. The other two ways to choose, a list of one's own and a learned gate, are
`--tap` and `heads.gate`.
"""

from __future__ import annotations

from featstore.errors import invalid

ROUNDINGS = ("floor", "nearest")


def uniform_layers(depth: int, kp: int, b: int = 2, rounding: str = "floor") -> list[int]:
    """Spread `kp` blocks evenly from block `b` to the last one.

    A block comes twice where more are asked for than there are from `b` on: ViT-Split's ADE20K
    configuration for ViT-G has block 27 twice (40 blocks, b = 27, Kp = 14), and its prior head is
    as wide as that list is long. Who reads each block once drops the repeats.

    Args:
        depth: Blocks of the backbone.
        kp: Blocks to choose; one is the last block.
        b: First block.
        rounding: "floor" as in the released code, or "nearest" as in the paper; a half goes to
            the even number, as HEADS.md has it for detection.

    Returns:
        Block numbers, ascending.

    Raises:
        InvalidInputError: There are no such blocks, or the rounding is not known.

    Source:
        ViT-Split, arXiv:2506.03433, equation 2, with the floor of its released code (HEADS.md 2.1).
    """
    _check(depth, kp)
    if not 0 <= b < depth:
        raise invalid("b", b, f"a block of the backbone, 0 to {depth - 1}")
    if rounding not in ROUNDINGS:
        raise invalid("rounding", rounding, f"one of {', '.join(ROUNDINGS)}")
    if kp == 1:
        return [depth - 1]
    span = depth - 1 - b
    if rounding == "floor":
        return [b + number * span // (kp - 1) for number in range(kp)]
    return [b + round(number * span / (kp - 1)) for number in range(kp)]


def last_layers(depth: int, kp: int) -> list[int]:
    """Choose the last `kp` blocks.

    Raises:
        InvalidInputError: There are not as many.
    """
    _check(depth, kp)
    return list(range(depth - kp, depth))


def _check(depth: int, kp: int) -> None:
    if not 1 <= kp <= depth:
        raise invalid("kp", kp, f"from 1 to {depth}, the blocks of the backbone")
