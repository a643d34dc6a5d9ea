"""The split of the embedded world's captions."""

import pytest

from noisepolicy.worlds.shapes import held_out_scenes, parse_caption, train_scenes


def test_split_is_a_partition_of_all_combinations():
    train, held_out = set(train_scenes()), set(held_out_scenes())
    assert (len(train), len(held_out)) == (1040, 256)
    assert not train & held_out


def test_split_covers_every_attribute_on_both_sides():
    for scenes in (train_scenes(), held_out_scenes()):
        assert {color for scene in scenes for color in scene.colors} == set(range(4))
        assert {shape for scene in scenes for shape in scene.shapes} == set(range(3))
        assert {scene.direction for scene in scenes} == {0, 1}


def test_captions_parse_back_to_their_scene():
    for scene in (*train_scenes(), *held_out_scenes()):
        assert parse_caption(scene.caption) == scene


@pytest.mark.parametrize("caption", ["", "a dog", "a red circle from left to right"])
def test_other_text_is_refused(caption):
    with pytest.raises(ValueError, match="not a caption"):
        parse_caption(caption)
