"""Draw where models look for a name in pictures of two drawings, a row for each picture, as the paper's figure 2.

    python embedded/attention_figure.py --models build/look/CLIP build/look/DiffCLIP \
        --cache-dir .cache/embedded --output docs/attention.png

For docs/attention.png the models were made by `python embedded/train.py --variant clip --epochs 50 --output-dir
build/look/CLIP --cache-dir .cache/embedded`, and so DiffCLIP with `--variant diffclip`: one budget, 350 steps.

The pictures are the first of those that `localization.py` measures on, with the left drawing's name and the right
one's in turn, so none is chosen for what comes of it. The maps are occlusion, half against the other name.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from emoji_data import HELD_OUT, load_drawings, load_emoji
from localization import choose_pairs, compose, inputs_of

from diffclip_hf import DiffCLIPModel, DiffCLIPProcessor
from diffclip_hf.common.loading import load_model, load_processor
from diffclip_hf.common.whole_files import write_whole
from diffclip_hf.visualization import against_others, draw_grid, image_occlusion


def main() -> None:
    """Draw as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", type=Path, required=True, help="folders, whose names are the titles")
    parser.add_argument("--cache-dir", type=Path, required=True, help="for the drawings, fetched on the first run")
    parser.add_argument("--output", type=Path, required=True, help="a PNG file")
    parser.add_argument("--rows", type=int, default=6, help="how many pictures")
    args = parser.parse_args()
    items = load_emoji(args.cache_dir)
    drawings, present = load_drawings(HELD_OUT, items, args.cache_dir)
    pairs = choose_pairs(items, np.flatnonzero(present).tolist(), seed=0, count=args.rows)
    models = []
    for folder in args.models:
        model = load_model(folder, DiffCLIPModel, dtype=torch.float32)
        models.append((model, load_processor(folder, model.config, DiffCLIPProcessor)))
    height = models[0][0].config.vision_config.image_size
    images, queries, values = [], [], []
    for row, pair in enumerate(pairs):
        picture = compose(drawings[pair[0]], drawings[pair[1]], height, height)
        # What is drawn is sharper than what the model sees.
        images.append(np.asarray(compose(drawings[pair[0]], drawings[pair[1]], 4 * height, 4 * height)))
        names = [items[index].name for index in pair]
        queries.append(names[row % 2])
        line = []
        for model, processor in models:
            maps = image_occlusion(model, **inputs_of(processor, names, picture), interpolate_pos_encoding=True)
            line.append(against_others(maps)[0, row % 2])
        values.append(line)
    figure = draw_grid(images, np.array(values), queries, [folder.name for folder in args.models])
    write_whole(args.output, lambda beside: figure.savefig(beside, format="png", dpi=150))


if __name__ == "__main__":
    main()
