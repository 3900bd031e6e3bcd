"""What a person can look at: the views that are trained on, and which images the features hold to be alike."""

import io
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from byol_core.checkpoint import atomic_write
from byol_core.data import ImageData, Views
from byol_core.folder import BadImageError
from byol_core.views import ViewRecipe, inverse_normalise

TILE, GAP = 96, 4  # pixels
ROWS, NEAREST = 8, 5


def tile(image: Tensor | Image.Image) -> Image.Image:
    """An image, or (3, H, W) in [0, 1], as a square tile; small ones are enlarged without smoothing."""
    if isinstance(image, Tensor):
        image = Image.fromarray((image.cpu() * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
    scale = TILE / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    square = Image.new("RGB", (TILE, TILE), "white")
    resized = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
    square.paste(resized, ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
    return square


def save_grid(path: Path, rows: Sequence[Sequence[Image.Image]], captions: Sequence[Sequence[str]]) -> None:
    """One PNG of tiles with a caption under each."""
    line = 14
    width = GAP + max(map(len, rows)) * (TILE + GAP)
    sheet = Image.new("RGB", (width, GAP + len(rows) * (TILE + line + GAP)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (tiles, texts) in enumerate(zip(rows, captions)):
        for j, (picture, text) in enumerate(zip(tiles, texts)):
            corner = GAP + j * (TILE + GAP), GAP + i * (TILE + line + GAP)
            sheet.paste(picture, corner)
            pen.text((corner[0], corner[1] + TILE + 1), text, fill="black")
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    atomic_write(path, lambda file: file.write(buffer.getvalue()))


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
    """(rows, cosines), both (queries, count): the most similar other rows of `features` (n, d) by cosine."""
    unit = nn.functional.normalize(features, dim=1)
    cosines = unit[queries] @ unit.T
    cosines[torch.arange(len(queries)), queries] = -2.0  # not itself
    best = cosines.topk(min(count, len(features) - 1))
    return best.indices, best.values


def save_neighbours(path: Path, data: ImageData, indices: Tensor, trained: Tensor, untrained: Tensor, seed: int) -> None:
    """For a few random images, the most similar others: after training, and below that, before it."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randperm(len(indices), generator=generator)[:ROWS]
    found = {"trained": nearest(trained, queries, NEAREST), "untrained": nearest(untrained, queries, NEAREST)}
    rows, captions = [], []
    for number, query in enumerate(queries.tolist()):
        for name, (neighbours, cosines) in found.items():
            shown = [query, *neighbours[number].tolist()]
            rows.append([tile(data.image(int(indices[row]))) for row in shown])
            captions.append([name, *(f"cos {cosine:.3f}" for cosine in cosines[number].tolist())])
    save_grid(path, rows, captions)
