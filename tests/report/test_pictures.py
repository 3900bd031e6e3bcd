"""The pictures show what they say: colours, neighbours, frames, maps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

from byol_core.report import pictures
from byol_core.report.pictures import (OTHER, SAME, nearest, project, save_embedding, save_neighbours, save_views, tile,
                                       write_text_at)
from byol_core.views.recipes import ViewRecipe, normalise
from tests.helpers.pictures import Folder, load


def test_tiles_keep_colours_and_proportions() -> None:
    square = np.asarray(tile(torch.tensor([1.0, 0.0, 0.5]).view(3, 1, 1).expand(3, 8, 8)))
    assert square.shape == (96, 96, 3) and (square == [255, 0, 128]).all()
    wide = np.asarray(tile(Image.new("RGB", (200, 100), (255, 0, 0))))
    assert (wide[48] == [255, 0, 0]).all() and (wide[2] == [255, 255, 255]).all()


def test_nearest_are_the_most_similar_others() -> None:
    features = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [-1.0, 0.0]])
    rows, distances = nearest(features, torch.tensor([0]), 2)
    assert rows.tolist() == [[1, 2]]
    assert distances[0].tolist() == pytest.approx([1 - 2 / (4 + 0.01) ** 0.5, 1.0], abs=1e-6)
    alike = torch.rand(3, 100, generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    assert (nearest(alike, torch.arange(6), 5)[1] >= 0).all()  # cosines of 1 are rounded to either side


def colours_in(path: Path) -> set[tuple[int, ...]]:
    colours = Image.open(path).getcolors(1 << 24)
    return {colour for _, colour in colours}


def test_views_picture_shows_the_pixels_of_the_views(image_folder: Folder, tmp_path: Path) -> None:
    data, recipe = load(image_folder(per_class=2), "device"), ViewRecipe(16)
    views = [torch.full((2, 3, 16, 16), value) for value in (0.2, 0.6)]
    save_views(tmp_path / "views.png", data, (recipe, recipe), torch.tensor([0, 1]),
               (normalise(views[0], recipe), normalise(views[1], recipe)))
    picture = np.asarray(Image.open(tmp_path / "views.png")).astype(int)
    for column, value in ((1, 0.2), (2, 0.6)):
        assert abs(picture[50, 4 + column * 100 + 50] - 255 * value).max() <= 2


@pytest.mark.slow
def test_frames_tell_the_classes_of_neighbours_apart(image_folder: Folder, tmp_path: Path) -> None:
    same, other = map(ImageColor.getrgb, (SAME, OTHER))
    data = load(image_folder("labelled", classes=2, per_class=4), "device")
    rows = torch.arange(8).flip(0)
    alike = torch.eye(2)[data.files.labels[rows]] + 0.01 * torch.rand(8, 2)  # each class in a direction of its own
    opposite = torch.eye(4).repeat(2, 1) + 0.01 * torch.rand(8, 4)  # each image is like one of the other class
    save_neighbours(tmp_path / "alike.png", data, rows[:4], alike[:4], alike[:4], 0)
    assert same in colours_in(tmp_path / "alike.png") and other not in colours_in(tmp_path / "alike.png")
    save_neighbours(tmp_path / "mixed.png", data, rows, alike, opposite, 0)
    assert {same, other} <= colours_in(tmp_path / "mixed.png")
    flat = load(image_folder("flat", classes=0, per_class=8), "device")
    save_neighbours(tmp_path / "flat.png", flat, rows, alike, opposite, 0)
    assert not {same, other} & colours_in(tmp_path / "flat.png")


def test_a_neighbour_is_captioned_with_its_distance_and_on_a_line_of_its_own_its_class(image_folder: Folder, tmp_path: Path,
                                                                                       monkeypatch) -> None:
    written: list[tuple[tuple[int, int], str]] = []
    monkeypatch.setattr(pictures, "write_text_at", lambda sheet, corner, text, *_: written.append((corner, text)))
    data = load(image_folder(classes=2, per_class=1), "device")
    save_neighbours(tmp_path / "pair.png", data, torch.arange(2), torch.eye(2), torch.ones(2, 2), 0)
    for distance in ("1.000", "0.000"):  # trained, untrained
        (x, y), *others = [corner for corner, text in written if text == distance]
        below = [text for corner, text in written if corner == (x, y + pictures.LINE)]
        assert len(others) == 1 and len(below) == 1 and below[0] in data.files.classes
    assert any("its distance, 1 - cosine, and class" in text for _, text in written)


def test_pictures_have_the_same_bytes_for_the_same_seed(image_folder: Folder, tmp_path: Path) -> None:
    data, features = load(image_folder(), "device"), torch.rand(16, 6)
    for name in ("a", "b"):
        save_neighbours(tmp_path / f"{name}.png", data, torch.arange(16), features, features, 3)
        save_embedding(tmp_path / f"{name}map.png", features, data.files.labels, data.files.classes, 3)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "amap.png").read_bytes() == (tmp_path / "bmap.png").read_bytes()


def test_first_map_is_the_plane_of_most_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(30, 2, generator=generator) * torch.tensor([9.0, 3.0])
    basis = torch.linalg.qr(torch.randn(5, 5, generator=generator))[0][:2]
    maps = project(plane @ basis + 1.0, 0)
    (title, points), (other, _) = maps.items()
    assert title == "PCA, 100% of the variance" and other == "t-SNE, seed 0"
    found, expected = (np.linalg.norm(x[:, None] - x[None], axis=2) for x in (points, plane.double().numpy()))
    assert found == pytest.approx(expected, abs=1e-4)  # distances survive when nothing lies outside the plane


@pytest.mark.parametrize("features, count", [
    (torch.ones(10, 4), 0), (torch.rand(2, 4), 0), (torch.rand(3, 4), 1), (torch.rand(5, 4), 2), (torch.rand(8, 1), 0),
    (torch.rand(10, 4), 1)])  # as so many take minutes
def test_maps_that_cannot_be_drawn_are_left_out(features: torch.Tensor, count: int, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(pictures, "TSNE_UP_TO", 9)
    assert len(project(features, 0)) == count
    save_embedding(tmp_path / "map.png", features, None, (), 0)
    assert (tmp_path / "map.png").exists() == (count > 0)


@pytest.mark.parametrize("classes", [3, 25])
def test_map_of_any_number_of_classes(classes: int, tmp_path: Path) -> None:
    labels = torch.arange(50) % classes
    save_embedding(tmp_path / "map.png", torch.rand(50, 4), labels, [f"<{number}>\x07" * 9 for number in range(classes)], 0)
    named = colours_in(tmp_path / "map.png")
    assert len([colour for colour in pictures.COLOURS if ImageColor.getrgb(colour) in named]) == min(classes, 20)


def test_text_is_cut_off_where_its_place_ends(tmp_path: Path) -> None:
    sheet = Image.new("RGB", (200, 20), "white")
    write_text_at(sheet, (0, 0), "a long name of a class " * 9, 60)
    ink = np.asarray(sheet).min(axis=(0, 2)) < 200
    assert ink.any() and not ink[62:].any()
