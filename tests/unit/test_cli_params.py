from __future__ import annotations

import click
import pytest

from cli.params import KeyValue, Size


@pytest.mark.parametrize(
    ("text", "size"), [("224", (224, 224)), ("240x320", (240, 320)), ("16X8", (16, 8))]
)
def test_a_size_is_one_or_two_numbers(text, size):
    assert Size().convert(text, None, None) == size


@pytest.mark.parametrize("text", ["", "0", "224x", "x224", "224x0", "-1", "1.5", "a"])
def test_another_size_is_refused(text):
    with pytest.raises(click.BadParameter, match="is no size"):
        Size().convert(text, None, None)


def test_a_key_has_a_value():
    assert KeyValue().convert("mask_form=a=b", None, None) == ("mask_form", "a=b")
    assert KeyValue().convert("x=", None, None) == ("x", "")


@pytest.mark.parametrize("text", ["x", "=3", "a b=3"])
def test_a_key_without_a_value_is_refused(text):
    with pytest.raises(click.BadParameter, match="KEY=VALUE"):
        KeyValue().convert(text, None, None)
