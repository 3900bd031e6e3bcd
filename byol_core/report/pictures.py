"""What a person can look at: the views trained on, which images the features hold to be alike, and a map of all of them."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor, nn

from byol_core.images.decoding import BadImageError
from byol_core.system.files import atomic_write
from byol_core.system.seeds import seed_from
from byol_core.views.batches import Views
from byol_core.views.pixels import ImageData
from byol_core.views.recipes import ViewRecipe, inverse_normalise

TILE, SMALL_TILE, GAP = 96, 76, 4  # pixels
TEXT, LINE = 15, 20  # size of letters and height of a line, in pixels: to be read on a phone, where a picture is made smaller
ROWS, NEAREST = 8, 5
NAME = 150  # pixels for a class beside its colour
MAP, DOT, FINER = 460, 3, 3  # edge of a map and radius of its dots in pixels; drawn that much finer, then reduced
TSNE_UP_TO, TSNE_STEPS = 2_000, 500  # points, as more take minutes; 1,000 steps keep neighbours no better
NAMED_CLASSES = 20  # told apart by colour
BLACK, GREY, SAME, OTHER = "#1b1f24", "#5d6875", "#1a8f4b", "#d0342c"
COLOURS = ("#2563c9", "#d9730d", "#1a8f63", "#c0312b", "#6b4fd8", "#7a5230", "#d05aa8", "#6b7280", "#a8a000", "#0b9fb3",
           "#8fb4ee", "#f4b97f", "#86cfae", "#ec9b96", "#b9acf0", "#c4a58c", "#efb3d8", "#b8bec7", "#d6d07a", "#86d5df")


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one small size only
        return ImageFont.load_default()


def tile(image: Tensor | Image.Image, edge: int = TILE) -> Image.Image:
    """An image, or (3, H, W) in [0, 1], as a square tile; small ones are enlarged without smoothing."""
    if isinstance(image, Tensor):
        image = Image.fromarray((image.cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    scale = edge / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    square = Image.new("RGB", (edge, edge), "white")
    resized = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    square.paste(resized, ((edge - size[0]) // 2, (edge - size[1]) // 2))
    return square


def write_text_at(sheet: Image.Image, corner: tuple[int, int], text: str, width: int, colour: str = BLACK) -> None:
    """One line of text, cut off where `width` pixels end."""
    pen, letters = ImageDraw.Draw(sheet), font(TEXT)
    if pen.textlength(text, font=letters) > width:
        while text and pen.textlength(text + "...", font=letters) > width:
            text = text[:-1]
        text += "..."
    pen.text(corner, text, fill=colour, font=letters)


def save_png(path: Path, sheet: Image.Image) -> None:
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    atomic_write(path, lambda file: file.write(buffer.getvalue()))


def save_grid(path: Path, rows: Sequence[Sequence[Image.Image]], captions: Sequence[Sequence[str]]) -> None:
    """One PNG of tiles with a caption under each."""
    width = GAP + max(map(len, rows)) * (TILE + GAP)
    sheet = Image.new("RGB", (width, GAP + len(rows) * (TILE + LINE + GAP)), "white")
    for i, (tiles, texts) in enumerate(zip(rows, captions)):
        for j, (picture, text) in enumerate(zip(tiles, texts)):
            corner = GAP + j * (TILE + GAP), GAP + i * (TILE + LINE + GAP)
            sheet.paste(picture, corner)
            write_text_at(sheet, (corner[0], corner[1] + TILE + 1), text, TILE)
    save_png(path, sheet)


def save_views(path: Path, data: ImageData, recipes: tuple[ViewRecipe, ViewRecipe], indices: Tensor, views: Views) -> None:
    """Each of the first images with its two views as the network sees them, in true colours."""
    rows, captions = [], []
    for index, view1, view2 in list(zip(indices.tolist(), *views))[:ROWS]:
        try:
            original = data.image(index)
        except BadImageError:
            continue  # its views are those of a stand-in
        rows.append([tile(original), tile(inverse_normalise(view1, recipes[0])), tile(inverse_normalise(view2, recipes[1]))])
        captions.append([f"original {original.width}x{original.height}", "view 1", "view 2"])
    if rows:
        save_grid(path, rows, captions)


def nearest(features: Tensor, queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(rows, distances), both (queries, count): the nearest other rows of `features` (n, d), by 1 - cosine."""
    unit = nn.functional.normalize(features, dim=1)
    cosines = unit[queries] @ unit.T
    cosines[torch.arange(len(queries)), queries] = -2.0  # not itself
    best = cosines.topk(min(count, len(features) - 1))
    return best.indices, (1 - best.values).clamp_min(0)  # which rounding may leave below


def save_neighbours(path: Path, data: ImageData, indices: Tensor, trained: Tensor, untrained: Tensor, seed: int) -> None:
    """For a few random images, the most similar others: after training, and below that, before it.

    With labels, neighbours are framed green where they are of the same class, red where they are not.
    """
    generator = torch.Generator().manual_seed(seed_from(seed, "neighbours"))
    queries = torch.randperm(len(indices), generator=generator)[:ROWS]
    found = nearest(trained, queries, NEAREST), nearest(untrained, queries, NEAREST)
    labels, classes = data.files.labels, data.files.classes
    heading = [f"{len(queries)} random images (seed {seed}) and the {NEAREST} nearest of {len(indices)} to each:",
               "above by the trained network, below by the untrained one;",
               "under each its distance, 1 - cosine" + ("" if labels is None else ", and class (green: the same)")]
    cell, row_height = SMALL_TILE + 2 * GAP, SMALL_TILE + (1 if labels is None else 2) * LINE + 2 * GAP
    left, block, first = 4 * GAP + SMALL_TILE, 2 * row_height + 3 * GAP, (len(heading) + 1) * LINE
    sheet = Image.new("RGB", (left + NEAREST * cell, first + len(queries) * block), "white")
    for number, text in enumerate(heading):
        write_text_at(sheet, (GAP, GAP + number * LINE), text, sheet.width - 2 * GAP)
    pen = ImageDraw.Draw(sheet)

    def show(corner: tuple[int, int], index: int, captions: Sequence[str]) -> None:
        sheet.paste(tile(data.image(index), SMALL_TILE), corner)
        if labels is not None:
            captions = [*captions, classes[labels[index]]]
        for number, text in enumerate(captions):
            write_text_at(sheet, (corner[0], corner[1] + SMALL_TILE + 2 + number * LINE), text, SMALL_TILE, GREY)

    for number, query in enumerate(queries.tolist()):
        own, top = int(indices[query]), first + number * block
        pen.line((GAP, top - 2 * GAP, sheet.width - GAP, top - 2 * GAP), fill="#dfe3e8")
        show((GAP, top), own, ())
        write_text_at(sheet, (GAP, top + row_height + SMALL_TILE // 2 - LINE // 2), "untrained:", SMALL_TILE + GAP, GREY)
        for line, (neighbours, distances) in enumerate(found):
            for place, (row, distance) in enumerate(zip(neighbours[number].tolist(), distances[number].tolist())):
                other, x, y = int(indices[row]), left + place * cell, top + line * row_height
                show((x, y), other, [f"{distance:.3f}"])
                if labels is not None:
                    frame = SAME if labels[other] == labels[own] else OTHER
                    pen.rectangle((x - 2, y - 2, x + SMALL_TILE + 1, y + SMALL_TILE + 1), outline=frame, width=2)
    save_png(path, sheet)


def project(features: Tensor, seed: int) -> dict[str, np.ndarray]:
    """By title, the features (n, d) on a plane, (n, 2): their principal components, and t-SNE where n is 4 to 2000.

    Empty for fewer than 3 images, and for features that all agree.
    """
    values = features.double().numpy()
    if len(values) < 3 or not values.std(0).any():
        return {}
    flat = PCA(min(50, *values.shape), random_state=seed % 2**32)
    components = flat.fit_transform(values)
    if components.shape[1] < 2:
        return {}
    shares = flat.explained_variance_ratio_
    maps = {f"PCA, {shares[:2].sum():.0%} of the variance": components[:, :2]}
    if 4 <= len(values) <= TSNE_UP_TO:
        tsne = TSNE(perplexity=min(30, (len(values) - 1) / 3), init="pca", max_iter=TSNE_STEPS, random_state=seed % 2**32)
        maps[f"t-SNE, seed {seed}"] = tsne.fit_transform(components.astype(np.float32))
    return maps


def save_embedding(path: Path, features: Tensor, labels: Tensor | None, classes: Sequence[str], seed: int) -> None:
    """One dot per image on maps of the features (n, d), coloured by class where there are labels (n,)."""
    maps = project(features, seed)
    if not maps:
        return
    named = labels is not None and len(classes) <= NAMED_CLASSES
    per_line = MAP // NAME
    legend = -(-len(classes) // per_line) if named else 1
    height = LINE + MAP + 2 * GAP
    sheet = Image.new("RGB", (MAP + 2 * GAP, len(maps) * height + (legend + 1) * LINE), "white")
    colours = [COLOURS[0]] * len(features) if labels is None else [COLOURS[label % len(COLOURS)] for label in labels.tolist()]
    for place, (title, points) in enumerate(maps.items()):
        top = GAP + place * height
        write_text_at(sheet, (GAP, top), f"{title}: {len(features)} images", MAP)
        sheet.paste(_dots(points, colours), (GAP, top + LINE))
    y = len(maps) * height + 2 * GAP
    if named:
        pen = ImageDraw.Draw(sheet)
        for number, name in enumerate(classes):
            x, line = GAP + number % per_line * NAME, y + number // per_line * LINE
            pen.ellipse((x + 2, line + 5, x + 12, line + 15), fill=COLOURS[number])
            write_text_at(sheet, (x + 18, line), name, NAME - 24)
    else:
        text = "no labels" if labels is None else f"coloured by class folder; {len(classes)} classes, so colours repeat"
        write_text_at(sheet, (GAP, y), text, MAP, GREY)
    save_png(path, sheet)


def _dots(points: np.ndarray, colours: Sequence[str]) -> Image.Image:
    edge, dot = MAP * FINER, DOT * FINER
    low, high = points.min(0), points.max(0)
    places = dot * 2 + (points - low) / np.maximum(high - low, 1e-12) * (edge - 4 * dot)
    canvas = Image.new("RGB", (edge, edge), "white")
    pen = ImageDraw.Draw(canvas)
    for (x, y), colour in zip(places.tolist(), colours):
        pen.ellipse((x - dot, edge - y - dot, x + dot, edge - y + dot), fill=colour)
    canvas = canvas.resize((MAP, MAP), Image.Resampling.LANCZOS)
    ImageDraw.Draw(canvas).rectangle((0, 0, MAP - 1, MAP - 1), outline="#dfe3e8")
    return canvas
