"""
What the distances of the tables can tell apart: sets of real images, a tenth of them spoilt, against
clean ones, by the reader and by toy features.

$ python -m common.power --out_dir=out         # reads out/tokenizer.pt; about 2 minutes on one core
"""
import os
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from common.files import load_checkpoint
from common.images import decode_images, encode_images, open_data
from common.metrics import distance_by_block, standard_error, toy_features
from common.reader import load_reader
from common.run import configure, start_run
from common.teachers import unpack_tokenizer
from common.world import CELL, COLORS, HELD_OUT, arrange, paint, random_choices

# -----------------------------------------------------------------------------
out_dir = 'out'        # folder of tokenizer.pt, where the reader is, too
n = 5000               # images of a set
n_reference = 5000     # renders that they are measured against
LIMITS = dict(n=500, n_reference=500)
# -----------------------------------------------------------------------------

SHARE = 0.1            # of a set that is spoilt
FIRST = HELD_OUT + 10 ** 8                             # index of the first image; the reference lies below
RED = 0                # row of PALETTE
GROWN = 5              # a small object is drawn at 5 / 4 of its size, between small and large


def scenes_at(index):
    """What images at index (B,) of the shapes world show."""
    return arrange(random_choices(index), open_background=False)


def some_of(scenes, rows):
    """Those of the scenes."""
    return SimpleNamespace(**{name: values[rows].copy() for name, values in vars(scenes).items()})


def spoilt_tenths(first, n, mix):
    """n renders from index `first` on -> images (n, 3, 32, 32), and six ways to spoil a tenth of
    them: {name: (rows, images in their place)}. mix(images, others, corners, rng) mixes a cell of
    each image with the same cell of another, by tokens or by pixels. The reader was trained to see
    mixed pieces and wrong sizes, but neither halves nor blur."""
    rng = np.random.RandomState(first % 2 ** 31)
    scenes = scenes_at(np.arange(first, first + n))
    clean = paint(scenes, 1)
    rows = rng.choice(n, int(SHARE * n), replace=False)
    object_of = pick_objects(scenes, rows, rng)
    corners = scenes.corner[rows, object_of]           # (tenth, row and column)
    others = paint(scenes_at(np.arange(first + n, first + n + len(rows))), 1)
    return clean, {
        'an object mixed with another image': (rows, mix(clean[rows], others, corners, rng)),
        'no red, another colour instead': without_red(scenes, rng),
        'an object of a third size': (rows, grown(some_of(scenes, rows), object_of, corners)),
        'one image, again and again': (rows, clean[rows[:1]].expand(len(rows), -1, -1, -1)),
        'half of an object': (rows, halved(clean[rows], corners)),
        'a blur': (rows, blurred(clean[rows])),
    }


def pick_objects(scenes, rows, rng):
    """One object of each of these images, (rows,)."""
    return (rng.random_sample(len(rows)) * scenes.n[rows]).astype(int)


def without_red(scenes, rng):
    """A tenth of the scenes, of those that show red -> rows, images with other colours instead."""
    shown = np.arange(scenes.color.shape[1]) < scenes.n[:, None]
    red = (scenes.color == RED) & shown
    rows = rng.choice(np.flatnonzero(red.any(1)), int(SHARE * len(red)), replace=False)
    changed = some_of(scenes, rows)
    new = 1 + rng.randint(len(COLORS) - 1, size=(len(rows), 1))
    changed.color = np.where(changed.color == RED, new, changed.color)
    return rows, paint(changed, 1)


def grown(scenes, object_of, corners):
    """These images with one object GROWN / 4 as large as a small one."""
    rows = np.arange(len(object_of))
    scenes.size[rows, object_of] = 0
    images = paint(scenes, 1)
    large = F.avg_pool2d(paint(scenes, GROWN), 4)      # the canvas, enlarged by 5 / 4
    for k, (row, column) in enumerate(corners):
        top = (row + CELL // 2) * GROWN // 4 - CELL // 2
        left = (column + CELL // 2) * GROWN // 4 - CELL // 2
        images[k, :, row:row + CELL, column:column + CELL] = large[k, :, top:top + CELL, left:left + CELL]
    return images


def halved(images, corners):
    """These images without the lower half of one object: the background of its cell's corner instead."""
    images = images.clone()
    for k, (row, column) in enumerate(corners):
        background = images[k, :, row, column, None, None]
        images[k, :, row + CELL // 2:row + CELL, column:column + CELL] = background
    return images


def blurred(images):
    """Each pixel becomes the mean of nine."""
    return F.avg_pool2d(F.pad(images, (1, 1, 1, 1), 'replicate'), 3, 1)


def inside_cells(corners, side, rng):
    """Half of the pieces of `side` pixels inside one cell of each image: bool (B, 1, 32, 32)."""
    mask = torch.zeros(len(corners), 1, 32, 32, dtype=torch.bool)
    for k, (row, column) in enumerate(corners):
        pieces = rng.random_sample((CELL // side, CELL // side)) < 0.5
        cell = torch.from_numpy(pieces).repeat_interleave(side, 0).repeat_interleave(side, 1)
        mask[k, 0, row:row + CELL, column:column + CELL] = cell
    return mask


def mix_pixels(images, others, corners, rng):
    """By pieces of 4 x 4 pixels."""
    return torch.where(inside_cells(corners, 4, rng), others, images)


def token_mixer(tokenizer):
    """-> mix, by the tokens of a tokenizer; an image is decoded whole."""
    side = 32 // int(tokenizer.N ** 0.5)               # pixels of a token

    def mix(images, others, corners, rng):
        mask = inside_cells(corners, side, rng)[:, 0, ::side, ::side].flatten(1)       # (B, N)
        tokens = torch.where(mask, encode_images(tokenizer, others), encode_images(tokenizer, images))
        return decode_images(tokenizer, tokens, [''] * len(tokens)).clamp(-1, 1)
    return mix


def separations(features, clean, spoilt, others, reference):
    """What features(images) make of a clean set and its spoilt tenths -> {name: (distance from the
    reference, its standard error, by how many standard errors it is farther than the clean set, than
    `others`, a clean set of other images)}."""
    wanted = features(reference)
    own = features(clean)
    base = distance_by_block(own, wanted)
    rival = distance_by_block(features(others), wanted)
    table = {'nothing': (base.mean(), standard_error(base), 0.0, errors_apart(base, rival))}
    for name, (rows, images) in spoilt.items():
        changed = own.clone()
        changed[rows] = features(images)
        values = distance_by_block(changed, wanted)
        table[name] = (values.mean(), standard_error(values), errors_apart(values, base),
                       errors_apart(values, rival))
    return table


def errors_apart(values, others):
    """The difference of two distances by block, in its standard errors."""
    difference = values - others
    return difference.mean() / standard_error(difference)


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    configure(globals())
    run = start_run()
    state = load_checkpoint(os.path.join(out_dir, 'tokenizer.pt'), 'tokenizer', 'Make it with: python tokenizer.py')
    tokenizer = unpack_tokenizer(dict(args=state['args'], net=state['net']))
    if tokenizer.config['image_size'] != 32:
        raise ValueError(f'{out_dir}/tokenizer.pt: is of {tokenizer.config["image_size"]} pixels, expected the 32 of the '
                         'shapes world; give --out_dir')
    source = open_data('shapes', 32)
    reader = load_reader(source, out_dir)

    # Draw the sets
    clean, spoilt = spoilt_tenths(FIRST, n, token_mixer(tokenizer))
    rows = np.arange(int(SHARE * n))
    tokens = encode_images(tokenizer, clean[rows])
    spoilt['decoded from its own tokens'] = rows, decode_images(tokenizer, tokens, [''] * len(rows))
    others = source.batch(np.arange(FIRST + 10 ** 6, FIRST + 10 ** 6 + n))[0]
    reference = source.batch(source.reference_split(n_reference)[0])[0]

    # Print the table
    tables = []
    for features in (reader.features, toy_features):
        tables.append(separations(features, clean, spoilt, others, reference))
    print(f'{n} real images, a tenth of them spoilt, against {n_reference} renders. Farther by so many standard errors '
          'than the same images unspoilt / than other real images')
    print(f'{"what is spoilt":38s}{"reader":>16s}{"farther by":>14s}{"toy FD":>18s}{"farther by":>14s}')
    for name in tables[0]:
        line = f'{name:38s}'
        for table in tables:
            distance, error, apart, rival = table[name]
            line += f'{f"{distance:.3f} ±{error:.3f}":>16s}{f"{apart:.1f} / {rival:.1f}":>14s}  '
        print(line)
