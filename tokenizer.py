"""
Images <-> tokens: the shapes world, image folders, and the VQ and bit tokenizers with soft decoding.

Everything that touches pixels lives here, so that the rest of the code only sees ids (B, N) and logits (B, N, V).
The helpers every script needs (overrides, distributed runs, files) stand at the end: this file is the bottom of the
import graph. Published tokenizers (MaskGIT's VQGAN, MaskBit's) are settings of the same autoencoder. Compared with
their trainers this one leaves out LPIPS and the discriminator; at 32x32 an L1 + L2 loss is enough.

$ python tokenizer.py                          # shapes world, about 3 minutes on 2 CPU cores -> out/tokenizer.pt
$ python tokenizer.py --data=my_images         # your folder: sub-folders are classes
$ torchrun --nproc_per_node=8 tokenizer.py --data=my_images --image_size=64 --batch_size=512
Expected: reconstruction error below 0.02 (mean absolute, images in [-1, 1]) and more than 90 % of the codes in use.
"""
import contextlib
import difflib
import functools
import glob
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import textwrap
import time
import zipfile
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from scipy import ndimage
from tqdm import tqdm

# -----------------------------------------------------------------------------
# I/O
data = 'shapes'        # 'shapes', 'shapes-open' (background left open: the stress test), or a folder of class folders
out_dir = 'out'        # tokenizer.pt, its log and its pictures go here
resume = False         # continue from out_dir/tokenizer.pt to the same bits
seed = 0               # every random number of the run follows from it
log_every = 20         # steps between log lines
save_every = 200       # steps between checkpoints and pictures
# network
image_size = 32        # pixels; images are resized (shorter side) and centre-cropped to it; the world: multiples of 32
ch = 16                # channels at full resolution; VQGAN 128
ch_mult = '1,2,4'      # channel multiplier of each level, each but the last halves the size; VQGAN 1,1,2,2,4
n_res = 1              # residual blocks per level; VQGAN 2
n_codes = 128          # codebook size V; VQGAN 1024
code_dim = 8           # numbers per code
# training
steps = 1200           # updates; with half of them the squared error is three to five times as large
warmup_free = 100      # first updates without quantisation, after which the codebook is set from encoder outputs
batch_size = 64        # images per update, all processes together
micro_batch = 0        # images per forward pass on one device, 0 = as many as fit one pass; lower it to save memory
lr = 2e-3              # AdamW, falls to a tenth along a cosine
apart = 8.0            # codes nearer to a busier one than this many mean squared errors of quantisation move on
commitment = 0.25      # weight of the commitment loss; VQ-VAE .25
# system
compile = False        # torch.compile the network
bench = False          # time 20 steps and stop
# -----------------------------------------------------------------------------
# The shapes world (design: 32x32, every image follows from its index)

SIZE, CELL = 32, 16                                    # canvas and quadrant; an object sits in one quadrant
HELD_OUT = 2 ** 31                                     # indices from here on are never trained on
COLORS = {'red': (222, 48, 48), 'green': (36, 176, 72), 'blue': (52, 96, 240), 'yellow': (248, 212, 48)}
SHAPES = ('circle', 'square', 'triangle', 'cross')
WORLDS = ('shapes', 'shapes-open')                     # closed: one background; open: any of the four, unnamed
BACKGROUNDS = ((24, 24, 32), (236, 232, 222), (128, 128, 136), (226, 150, 200))  # the default world has one
RADII = (4.0, 6.0)                                     # two sizes, never named
NUMBERS = {'two': 2, 'three': 3, 'four': 4}
LAYOUTS = np.array([[(8, 8)] * 4,                      # top left corners (row, column) of the cells: one object,
                    [(0, 0), (16, 16)] * 2,            # a pair,
                    [(0, 0), (0, 16), (16, 8), (0, 0)],  # three,
                    [(0, 0), (0, 16), (16, 0), (16, 16)],  # four,
                    [(8, 0), (8, 16)] * 2, [(8, 16), (8, 0)] * 2, [(0, 8), (16, 8)] * 2, [(16, 8), (0, 8)] * 2])
RELATIONS = ('left of', 'right of', 'above', 'below')
TASKS = ('single_object', 'two_object', 'counting', 'colors', 'position', 'color_attr')  # GenEval's six
PLURALS = ('circles', 'squares', 'triangles', 'crosses')
WORDS = ('a', 'and', *NUMBERS, *COLORS, *SHAPES, *PLURALS, 'shape', 'left', 'right', 'of', 'above', 'below')
CAPTION_LENGTH = 8                                     # 'a red circle left of a blue square'
PALETTE = np.array([*COLORS.values(), *BACKGROUNDS], dtype=np.float32)


@functools.cache
def sprites(scale=1):
    """Opacity of every shape and size, centred in a quadrant: (4 shapes, 2 sizes, 16 scale, 16 scale) in [0, 1], anti-
    aliased from signed distances. The renderer pastes them, the checker compares with them."""
    (y, x), r = (np.mgrid[:CELL * scale, :CELL * scale] + 0.5) / scale - CELL / 2, np.array(RADII)[:, None, None]
    circle = np.hypot(x, y) - r                                                          # (2, 16 scale, 16 scale)
    square = np.maximum(abs(x), abs(y)) - r
    triangle = np.maximum((2 * abs(x) - y - r) / 5 ** 0.5, y - r)
    bar = lambda a, b: np.maximum(abs(a) - r, abs(b) - r / 2 + 1)
    cross = np.minimum(bar(x, y), bar(y, x))
    return np.clip(0.5 - scale * np.stack([circle, square, triangle, cross]), 0, 1).astype(np.float32)


PHRASE = rf'(a|{"|".join(NUMBERS)}) ?(|{"|".join(COLORS)}) ({"|".join(SHAPES)}|shape)(e?s)?'  # 'two red circles'


def caption_of(task, u, color, shape, relation, n):
    """The words for one image; `u` decides between the two forms of the colour task."""
    colored = [f'{list(COLORS)[c]} {SHAPES[s]}' for c, s in zip(color, shape)]
    return (f'a {SHAPES[shape[0]]}',
            f'a {SHAPES[shape[0]]} and a {SHAPES[shape[1]]}',
            f'{list(NUMBERS)[n - 2]} {list(COLORS)[color[0]]} {PLURALS[shape[0]]}',
            f'a {colored[0]}' if u < 0.5 else f'a {list(COLORS)[color[0]]} shape',
            f'a {colored[0]} {RELATIONS[relation]} a {colored[1]}',
            f'a {colored[0]} and a {colored[1]}')[task]


def draw(index, open_background=False, scale=1):
    """Render images of the shapes world: index (B,) ints -> images float (B, 3, 32, 32) in [-1, 1], captions; `scale`
    2 draws the same at 64. Image i is the same on every machine (NumPy's legacy generator is frozen). The caption fixes
    the layout; what it leaves open is uniform: sizes, a lone object's place, colour or shape where unnamed, a
    background if asked."""
    index = np.atleast_1d(np.asarray(index, dtype=np.int64))
    u = np.stack([np.random.RandomState(i).random_sample(32) for i in index])           # (B, 32) in [0, 1)
    pick = lambda column, n: (u[:, column] * n).astype(int)
    B = len(index)
    task, relation = pick(0, 6), pick(1, 4)
    color, shape = (u[:, 4:8] * len(COLORS)).astype(int), (u[:, 8:12] * len(SHAPES)).astype(int)
    other = lambda values, n: (values + 1 + pick(2, n - 1)) % n                          # uniform among the rest
    color[:, 1] = np.where(task >= 4, other(color[:, 0], len(COLORS)), color[:, 1])      # pairs differ in colour ...
    shape[:, 1] = np.where(task == 1, other(shape[:, 0], len(SHAPES)), shape[:, 1])      # ... or in shape
    counting = task == 2
    color[counting], shape[counting] = color[counting, :1], shape[counting, :1]
    n = np.array([1, 2, 0, 1, 2, 2])[task] + counting * (2 + pick(3, 3))                 # (B,) objects
    layout = np.select([task == 4, n == 1, n == 2, n == 3], [4 + relation, 0, 1, 2], 3)
    size = (u[:, 16:20] * len(RADII)).astype(int)
    shift = 4 * (2 * (u[:, 20:22] * 2).astype(int) - 1) * (n == 1)[:, None]  # a lone object has four places
    corner = LAYOUTS[layout] + shift[:, None]                                            # (B, 4, row and column)

    background = pick(28, len(BACKGROUNDS)) * bool(open_background)
    canvas = np.zeros((B, SIZE * scale, SIZE * scale, 3), dtype=np.float32)
    canvas += PALETTE[len(COLORS) + background][:, None, None]
    box, corner = np.arange(CELL * scale), corner * scale
    for k in range(4):
        has = np.flatnonzero(n > k)
        at = (has[:, None, None], (corner[has, k, :1] + box)[:, :, None], (corner[has, k, 1:] + box)[:, None, :])
        alpha = sprites(scale)[shape[has, k], size[has, k]][..., None]
        canvas[at] += alpha * (PALETTE[color[has, k]][:, None, None] - canvas[at])
    images = torch.from_numpy(np.rint(canvas)).permute(0, 3, 1, 2) / 127.5 - 1
    captions = [caption_of(*row) for row in zip(task, u[:, 29], color, shape, relation, n)]
    return images.contiguous(), captions


def parse_caption(caption):
    """What a caption asks for: (task, [(colour or '', shape or '')] per object, relation or '').
    Raises ValueError for a caption outside the grammar."""
    text = caption.strip().lower()
    relation = next((r for r in RELATIONS if f' {r} ' in text), '')
    objects, counted = [], False
    phrases = re.split(f' {relation} ' if relation else ' and ', text)
    for phrase in phrases:
        match = re.fullmatch(PHRASE, phrase)
        if not match or len(phrases) > 2:
            raise ValueError(f'{phrase!r} in {caption!r} is outside the grammar, which reads like "a red circle left '
                             'of a blue square", "three green squares", "a circle and a cross" or "a yellow shape"')
        number, color, shape, _ = match.groups()
        counted |= number != 'a'
        objects += [(color, '' if shape == 'shape' else shape)] * NUMBERS.get(number, 1)
    if counted and len(phrases) > 1:
        raise ValueError(f'{caption!r} is outside the grammar: a number stands alone, as in "three green squares"')
    colored = all(color for color, _ in objects)
    task = ('position' if relation else 'counting' if counted else
            ('color_attr' if colored else 'two_object') if len(objects) > 1 else
            'colors' if colored else 'single_object')
    return task, objects, relation


def look(images):
    """Find the objects in images (B, 3, 32, 32), larger ones averaged to that: a dict of arrays with one entry per
    object (image, color, shape, size, row, column, all ints, shape -1 where nothing fits) and `background` with one
    per image. Nearest palette colour, connected components, best overlap with the sprites at shifts of one pixel."""
    small = F.adaptive_avg_pool2d(images.detach().float().cpu().clamp(-1, 1), SIZE)
    rgb = (small.permute(0, 2, 3, 1).numpy() + 1) * 127.5
    nearest = ((rgb[:, :, :, None] - PALETTE) ** 2).sum(-1).argmin(-1)                     # (B, 32, 32) palette index
    ground = np.stack([(nearest == len(COLORS) + k).sum((1, 2)) for k in range(len(BACKGROUNDS))], 1).argmax(1)
    flat = np.pad(ndimage.generate_binary_structure(2, 1)[None], ((1, 1), (0, 0), (0, 0)))  # never connect two images
    label, _ = ndimage.label(nearest < len(COLORS), structure=flat)
    sizes = np.bincount(label.ravel())
    boxes = [(i, b) for i, b in enumerate(ndimage.find_objects(label), 1) if sizes[i] >= 8]  # smaller: specks
    seen = np.zeros((4, len(boxes)), dtype=int)                                           # image, color, row, column
    padded = np.pad(label, ((0, 0), (CELL, CELL), (CELL, CELL)))
    crops = np.zeros((len(boxes), CELL, CELL), dtype=np.float32)
    for k, (i, (image, rows, columns)) in enumerate(boxes):
        row, column = (rows.start + rows.stop) // 2, (columns.start + columns.stop) // 2  # centre of the bounding box
        window = (slice(at + CELL // 2, at + 3 * CELL // 2) for at in (row, column))
        crops[k] = padded[(image.start, *window)] == i
        part = nearest[image.start, rows, columns][label[image.start, rows, columns] == i]
        seen[:, k] = image.start, np.bincount(part).argmax(), row, column
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    bank = np.stack([np.roll(sprites() > 0.5, s, (2, 3)) for s in shifts], 2).astype(np.float32)  # (4, 2, 9, 16, 16)
    bank, crops = bank.reshape(-1, CELL * CELL), crops.reshape(-1, CELL * CELL)
    inside = crops @ bank.T
    overlap = inside / (crops.sum(1)[:, None] + bank.sum(1) - inside)                     # intersection over union
    shape, size, shift = np.unravel_index(overlap.argmax(1), (len(SHAPES), len(RADII), len(shifts)))
    image, color, row, column = seen
    dy, dx = np.array(shifts).T[:, shift]
    return dict(image=image, color=color, shape=np.where(overlap.max(1) >= 0.6, shape, -1), size=size, row=row + dy,
                column=column + dx, background=ground)


def check(images, captions):
    """Does each image show exactly what its caption says? images (B, 3, H, H), captions -> bool array (B,).
    The rule-based counterpart of GenEval: no object missing, none too many, names and relation right."""
    found, names = look(images), (('',) + SHAPES, tuple(COLORS))
    verdict = np.zeros(len(captions), dtype=bool)
    for i, caption in enumerate(captions):
        _, wanted, relation = parse_caption(caption)
        seen = [(names[1][found['color'][k]], names[0][found['shape'][k] + 1], found['row'][k], found['column'][k])
                for k in np.flatnonzero(found['image'] == i)]
        if len(seen) != len(wanted) or not all(s[1] for s in seen):
            continue
        fits = lambda want, s: want[0] in ('', s[0]) and want[1] in ('', s[1])
        for order in (seen, seen[::-1]):
            (_, _, r0, c0), (_, _, r1, c1) = order[0], order[-1]
            placed = {'': True, 'left of': c1 - c0 > 4, 'right of': c0 - c1 > 4,
                      'above': r1 - r0 > 4, 'below': r0 - r1 > 4}[relation]
            verdict[i] |= placed and all(map(fits, wanted, order))
    return verdict


def wrong_caption(caption, u):
    """The caption with one fact changed, a colour, a shape, the number or the relation, or exchanged between its two
    objects; chosen by u in [0, 1)."""
    words = caption.split()
    groups = (tuple(NUMBERS), tuple(COLORS), SHAPES, PLURALS, ('left', 'right'), ('above', 'below'))
    places = [(k, g) for k, w in enumerate(words) for g in groups if w in g]
    k, group = places[int(u * len(places))]
    for j in (j for j, g in places if g is group and words[j] != words[k] and u * 1e4 % 1 < 0.4):
        words[j], words[k] = words[k], words[j]                                           # two objects exchange a fact
        if {*' '.join(words).split(' and ')} != {*caption.split(' and ')}:
            return ' '.join(words)
        words = caption.split()
    rest = [w for w in group if w != words[k]]
    words[k] = rest[int(u * 1e6) % len(rest)]
    return ' '.join(words)


def factors(images, captions, world='shapes'):
    """Mode dropping, factor by factor: total-variation distance in [0, 1] between what the images show and the known
    law (uniform, independent) of all that the captions leave open. images (B, 3, H, H) -> {factor: distance}."""
    found = look(images)
    known = found['shape'] >= 0
    asked = [parse_caption(c)[1] for c in captions]
    unnamed = lambda part: np.array([not asked[i][0][part] for i in found['image']], dtype=bool) & known
    alone = np.array([len(asked[i]) == 1 for i in found['image']], dtype=bool) & known
    place = 2 * (found['row'] >= SIZE // 2) + (found['column'] >= SIZE // 2)
    image, size, color, uniform = found['image'], found['size'], found['color'], lambda k: np.full(k, 1 / k)
    pair = (image[1:] == image[:-1]) & known[1:] & known[:-1] & ~alone[1:]                # two objects of one image
    n, large = (np.bincount(image[known], w, len(captions)).astype(int) for w in (None, size[known]))
    group = np.concatenate([large[n == 3], 4 + large[n == 4]])                            # large ones of 3, of 4
    coins = np.concatenate([sum(n == 3) * np.array([1, 3, 3, 1]) / 8, sum(n == 4) * np.array([1, 4, 6, 4, 1]) / 16])
    table = {'size': (size[known], uniform(2)), 'pairs': ((size[1:] == size[:-1])[pair] + 0, uniform(2)),  # alike?
             'color pairs': ((color[1:] == color[:-1])[pair & unnamed(0)[1:]] + 0, np.array([0.75, 0.25])),
             'groups': (group, coins / len(group) if len(group) else uniform(9)),
             'position': (place[alone], uniform(4)), 'color': (color[unnamed(0)], uniform(4)),
             'shape': (found['shape'][unnamed(1)], uniform(4)),
             'background': (found['background'], uniform(4 if world == 'shapes-open' else 1))}
    def distance(values, law):
        share = np.bincount(values, minlength=9) / max(1, len(values))
        return float(abs(share - np.pad(law, (0, 9 - len(law)))).sum() / 2)
    return {name: distance(*row) for name, row in table.items()}


# -----------------------------------------------------------------------------
# Where images come from: the shapes world, or a folder

def read_image(path, size):
    """One file -> uint8 (size, size, 3): upright, alpha laid on white, shorter side resized to `size` (antialiased
    bicubic), centre crop. Returns the reason as a string if the file cannot be read."""
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode in ('I', 'F') or image.mode.startswith('I;16'):  # deep grey: to 8 bits, by its range
                grey = np.asarray(image, np.float64)
                top = 65535 if ';16' in image.mode or grey.max() > 255 else 255 if grey.max() > 1 else 1
                image = Image.fromarray((grey * 255 / top).clip(0, 255).astype(np.uint8))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image.convert('RGBA'))
            return np.asarray(ImageOps.fit(image.convert('RGB'), (size, size), Image.Resampling.BICUBIC))
    except Exception as error:  # PIL raises many kinds here
        return f'{type(error).__name__}: {error}'


class Images:
    """Images with captions, by index: `data` is 'shapes', 'shapes-open' or a folder whose sub-folders are classes.
    `words` and `caption_length` are the vocabulary that captions use; a class label is a one-word caption. Exits if
    the vocabulary is not the one `expected`, that of a trained model."""

    def __init__(self, data, size, n_images=50_000, expected=None):
        self.data, self.size, self.is_world, self.bad = data, size, data in WORLDS, {}
        if self.is_world:
            if size % SIZE:
                raise SystemExit(f'the shapes world is drawn at multiples of {SIZE} pixels, not {size}; try '
                                 f'--image_size={max(1, round(size / SIZE)) * SIZE}')
            self.words, self.caption_length, self.length = WORDS, CAPTION_LENGTH, n_images
        else:
            self.find_files()
        if expected is not None and list(self.words) != list(expected):
            raise SystemExit(f'--data={data} has {len(self.words)} words ({", ".join(self.words[:4])}, ...), the model '
                             f'knows {len(expected)} ({", ".join(expected[:4])}, ...); give the data it was trained on')

    def find_files(self):
        """Classes in the order of their names, numbers in the order of their values."""
        data, root = self.data, os.path.abspath(self.data)
        if not os.path.isdir(root):
            raise SystemExit(f"--data={data}: no such folder; expected 'shapes', 'shapes-open' or a folder of images")
        names = sorted((d.name for d in os.scandir(root) if d.is_dir() and not d.name.startswith('.')),
                       key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
        walk = lambda top: sorted(path for w, _, fs in os.walk(top) for f in fs if not f.startswith('.')
                                  and os.path.isfile(path := os.path.join(w, f)))        # no dead links
        groups = {name: files for name in names if (files := walk(os.path.join(root, name)))} or {'image': walk(root)}
        self.words, self.caption_length = tuple(groups), 1
        self.files = [(path, label) for label, files in enumerate(groups.values()) for path in files]
        self.length = len(self.files)
        if self.length < 8:
            raise SystemExit(f'--data={data}: {self.length or "no"} files found, expected at least 8; put images into '
                             'sub-folders, one per class')
        loose = len(walk(root)) - self.length
        if loose:
            print(f'note: {loose} files in {data} lie outside its class folders and are left out')
        if len(groups) == 1:
            print(f'note: {data} has a single class, {self.words[0]!r}: captions carry no information, so guidance has '
                  'nothing to steer. Use one sub-folder per class if there are classes.')

    def read(self, index):
        """Images of the folder as a list of uint8 (size, size, 3), None where a file cannot be read; such a file is
        named once. Threads decode: PIL lets them run in parallel."""
        paths = [self.files[i][0] for i in index]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda path: self.bad.get(path) or read_image(path, self.size), paths))
        for path, pixels in zip(paths, found):
            if isinstance(pixels, str) and path not in self.bad:
                self.bad[path] = pixels
                tqdm.write(f'skipped {path}: {pixels}')
        return [None if isinstance(pixels, str) else pixels for pixels in found]

    def batch(self, index):
        """index (B,) -> images (B, 3, H, W) in [-1, 1], captions. An unreadable file (now in `bad`) is replaced by
        the next readable one."""
        if self.is_world:
            return draw(index, self.data == 'shapes-open', self.size // SIZE)
        index, pixels, captions = [int(i) for i in index], [], []
        for i, image in zip(index, self.read(index)):
            while image is None:
                if len(self.bad) == self.length:
                    raise SystemExit(f'--data={self.data}: not one of its {self.length} files is a readable image')
                i = (i + 1) % self.length
                image = self.read([i])[0]
            pixels.append(image)
            captions.append(self.words[self.files[i][1]])
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1, captions

    def key(self):
        """What the content depends on: the world, or every file's name, size and time."""
        if self.is_world:
            return [self.data, self.length, self.size]
        stats = [(path, os.stat(path)) for path, _ in self.files]
        return [self.size] + [[path, s.st_size, s.st_mtime_ns] for path, s in stats]


def word_ids(captions, words, length):
    """Captions -> condition ids (B, length), filled up with len(words), which means "no word". A caption that is
    itself a word (a class label) stays whole. Raises ValueError naming an unknown word and its nearest neighbours."""
    ids = torch.full((len(captions), length), len(words), dtype=torch.int64)
    for i, caption in enumerate(captions):
        parts = [caption.strip()] if caption.strip() in words else caption.lower().split()
        for k, word in enumerate(parts):
            if word not in words:
                near = difflib.get_close_matches(word, words, n=3, cutoff=0.3)
                raise ValueError(f'unknown word {word!r} in {caption!r}; '
                                 + (f'nearest known: {", ".join(near)}' if near else f'known: {", ".join(words[:40])}'))
            if k >= length:
                raise ValueError(f'{caption!r} has {len(parts)} words; this model reads at most {length}')
            ids[i, k] = words.index(word)
    return ids


@torch.no_grad()
def token_data(images, tokenizer, folder, device, batch=256, flips=False):
    """The whole data set as one memory-mapped array (M, N + T) of the smallest sufficient integers: tokens, then
    condition ids; with `flips` each image is followed by its mirror image. Encoded once: processes share the work (all
    must call this), and an interrupted run continues. The file name carries a hash of the images and of the
    tokenizer's weights, so a stale cache is never used."""
    key = json.dumps([*images.key(), bool(flips), tokenizer.digest()])
    path = os.path.join(folder, f'tokens-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy')
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    meet = dist.barrier if world > 1 else lambda: None
    if not os.path.exists(path):                                 # for all alike: it appears once all have met below
        part, new = path + '.partial', path + '.tmp'
        copies, width = 1 + flips, tokenizer.N + images.caption_length
        kind = np.min_scalar_type(-max(tokenizer.V, len(images.words) + 1))              # the smallest signed type
        if rank == 0 and not os.path.exists(part):               # an image's rows, then 0 to do, 1 good or 2 bad
            with writing(path):
                np.lib.format.open_memmap(new, 'w+', kind, (images.length, copies * width + 1)).flush()
                os.replace(new, part)
        meet()
        table = np.load(part, mmap_mode='r')
        bar = progress(images.length, 'encoding images')
        for start in range(rank * batch, images.length, world * batch):
            index = np.arange(start, min(start + batch, images.length))
            bar.update(min(world * batch, images.length - start))
            if table[index, -1].all():
                continue
            pixels, captions = images.batch(index)
            state = [1 if images.is_world or images.files[i][0] not in images.bad else 2 for i in index]
            views = (pixels, pixels.flip(-1))[:copies]
            ids = torch.stack([torch.cat([tokenizer.encode(x.to(device)) for x in v.split(tokenizer.batch)])
                               for v in views], 1).cpu()                                 # (B, copies, N)
            cond = word_ids(captions, images.words, images.caption_length)
            rows = torch.cat([ids, cond[:, None].expand(-1, copies, -1)], 2).flatten(1)  # (B, copies (N + T))
            rows = np.column_stack([rows.numpy(), state]).astype(kind)
            with writing(part), open(part, 'r+b') as file:
                file.seek(table.offset + start * rows[0].nbytes)
                file.write(rows.tobytes())
        bar.close()
        meet()
        if rank == 0:
            table = np.load(part, mmap_mode='r')
            keep = np.flatnonzero(table[:, -1] == 1)
            if len(keep) < images.length:
                print(f'{images.length - len(keep)} of {images.length} files were skipped')
            with writing(path), open(new, 'wb') as file:
                np.save(file, table[keep, :-1].reshape(-1, width))
            os.replace(new, path)
            os.remove(part)
        meet()
    return np.load(path, mmap_mode='r')


# -----------------------------------------------------------------------------
# The autoencoder: our small one, the taming VQGAN of MaskGIT and MaskBit's bit tokenizer are settings of it

def bit_rows(k):
    """The 2^k codes of k bits as rows of -1/+1 (2^k, k), least significant bit first."""
    return (torch.arange(2 ** k, device='cpu')[:, None] >> torch.arange(k, device='cpu') & 1) * 2.0 - 1


class ResBlock(nn.Module):
    """Two convolutions with a residual; `plain` (MaskBit): they have no bias, and where channels change the shortcut
    acts on the *output* of the second, so that the input does not reach the sum."""

    def __init__(self, c_in, c_out, groups, plain):
        super().__init__()
        self.late = plain and c_in != c_out
        self.norm1, self.norm2 = (nn.GroupNorm(groups, c, eps=1e-6) for c in (c_in, c_out))
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=not plain)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=not plain)
        self.nin_shortcut = (nn.Conv2d(c_out if plain else c_in, c_out, 1, bias=not plain) if c_in != c_out
                             else nn.Identity())

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return self.nin_shortcut(h if self.late else x) + h


class Attention(nn.Module):
    """One head over the positions of a feature map (B, C, H, W), with a residual."""

    def __init__(self, c, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))    # (B, H W, C)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Level(nn.Module):
    """n residual blocks from c_in to c channels, those numbered in `attend` followed by attention, then perhaps a
    convolution that changes the resolution."""

    def __init__(self, c_in, c, n, groups, plain, attend, resample=''):
        super().__init__()
        self.block = nn.ModuleList([ResBlock(c if k else c_in, c, groups, plain) for k in range(n)])
        self.attn = nn.ModuleList([Attention(c, groups) if k in attend else nn.Identity() for k in range(n)])
        if resample == 'down':
            self.downsample = nn.Conv2d(c, c, 3, stride=2)
        if resample == 'up':
            self.upsample = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, h):
        for block, attn in zip(self.block, self.attn):
            h = attn(block(h))
        if hasattr(self, 'downsample'):
            h = self.downsample(F.pad(h, (0, 1, 0, 1)))          # one column right, one row below
        if hasattr(self, 'upsample'):
            h = self.upsample(F.interpolate(h, scale_factor=2.0, mode='nearest'))
        return h


class Tokenizer(nn.Module):
    """Autoencoder: images (B, 3, H, W) in [-1, 1] <-> ids (B, N), N = S * grid * grid, row by row.

    A code is a learnt row of `code_dim` numbers. With S > 0 it is MaskBit's: `code_dim` bits -1/+1, and S codes
    stand side by side at each place of the grid (the first holds the low bits). `mid` residual blocks stand in the
    middle, `up` in each level of the decoder (0: n_res), z channels between encoder and codes (0: the width there);
    `attention` names the levels that have it, as in '4,mid'.
    """

    def __init__(self, image_size, ch, ch_mult, n_res, n_codes, code_dim, S=0, mid=0, up=0, z=0, attention='',
                 groups=0):
        super().__init__()
        self.config = dict(image_size=image_size, ch=ch, ch_mult=ch_mult, n_res=n_res, n_codes=n_codes,
                           code_dim=code_dim, S=S, mid=mid, up=up, z=z, attention=attention, groups=groups)
        widths, attend = [ch * int(m) for m in ch_mult.split(',')], attention.split(',')
        last, top = len(widths) - 1, widths[-1]
        if min(widths) < 1:
            raise ValueError(f'ch_mult {ch_mult} has a level without channels; expected numbers from 1, as in 1,2,4')
        if image_size < 1 or image_size % 2 ** last:
            raise ValueError(f'image_size {image_size} is not a multiple of {2 ** last}, which the '
                             f'{len(widths)} levels of ch_mult {ch_mult} need')
        groups, z, plain = groups or min(32, ch // 2), S * code_dim or z or top, S > 0
        self.V, self.S, self.grid, self.source = n_codes, max(1, S), image_size // 2 ** last, None
        self.N = self.S * self.grid ** 2
        self.batch = max(1, min(256, 2 ** 21 // image_size ** 2))  # images that fit one pass: 32 at 256x256
        level = lambda i, c_in, c, n, resample: Level(c_in, c, n, groups, plain, range(n) if str(i) in attend else (),
                                                      resample)
        middle = lambda: Level(top, top, mid, groups, plain, [0] if 'mid' in attend else ())
        self.encoder = nn.Sequential(OrderedDict(                # images (B, 3, H, W) -> (B, z, grid, grid)
            conv_in=nn.Conv2d(3, ch, 3, padding=1, bias=not plain),
            down=nn.Sequential(*(level(i, c_in, c, n_res, 'down' if i < last else '')
                                 for i, (c_in, c) in enumerate(zip([ch, *widths], widths)))),
            mid=middle(),
            norm_out=nn.GroupNorm(groups, top, eps=1e-6), act=nn.SiLU(),
            conv_out=nn.Conv2d(top, z, 1 if plain else 3, padding=0 if plain else 1)))
        if plain:
            self.register_buffer('codes', bit_rows(code_dim))                            # (V, code_dim)
            self.quant_conv = self.post_quant_conv = nn.Identity()
        else:
            self.quant_conv = nn.Conv2d(z, code_dim, 1)
            self.codebook = nn.Embedding(n_codes, code_dim)
            self.post_quant_conv = nn.Conv2d(code_dim, z, 1)
        self.decoder = nn.Sequential(OrderedDict(                # (B, z, grid, grid) -> images, deepest level first
            conv_in=nn.Conv2d(z, top, 3, padding=1),
            mid=middle(),
            up=nn.Sequential(*(level(i, widths[min(i + 1, last)], widths[i], up or n_res, 'up' if i else '')
                               for i in range(last, -1, -1))),
            norm_out=nn.GroupNorm(groups, widths[0], eps=1e-6), act=nn.SiLU(),
            conv_out=nn.Conv2d(widths[0], 3, 3, padding=1)))

    @property
    def table(self):
        """The codes as the decoder sees them: (V, code_dim)."""
        return self.codes if self.config['S'] else self.codebook.weight

    def latents(self, images):
        """Images (B, 3, H, W) -> encoder outputs before quantisation (B, N, code_dim)."""
        images = (images + 1) / 2 if self.config['S'] else images                        # MaskBit sees [0, 1]
        z = self.quant_conv(self.encoder(images)).flatten(2).transpose(1, 2)             # (B, grid^2, S code_dim)
        return z.reshape(len(z), -1, self.config['code_dim'])

    def nearest(self, z):
        """z (..., code_dim) -> id of the nearest code (Euclidean), (...); for bits their signs, 0 counting as -1."""
        if self.config['S']:
            return ((z > 0) << torch.arange(z.shape[-1], device=z.device)).sum(-1)
        e = self.codebook.weight
        with torch.autocast(z.device.type, enabled=False):       # bf16 would choose another code for a third of them
            return (e.square().sum(1) - 2 * z.to(e.dtype) @ e.T).argmin(-1)  # |z|^2 is the same for all rows

    def decode_latents(self, z):
        """(B, N, code_dim) -> images (B, 3, H, W), not clamped."""
        side = math.isqrt(z.shape[1] // self.S)
        z = z.reshape(len(z), side, side, -1).permute(0, 3, 1, 2)                        # (B, S code_dim, grid, grid)
        images = self.decoder(self.post_quant_conv(z))
        return images * 2 - 1 if self.config['S'] else images

    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1], H = W a multiple of the cell -> ids (B, N)."""
        cell = self.config['image_size'] // self.grid
        if images.dim() != 4 or images.shape[2] != images.shape[3] or images.shape[2] % cell:
            raise ValueError(f'encode expects square images whose side is a multiple of {cell}, got '
                             f'{tuple(images.shape)}')
        return self.nearest(self.latents(images))

    def decode(self, x, text=None):
        """Ids (B, N), or float probabilities (B, N, V), -> images (B, 3, H, W), nominally in [-1, 1], not clamped.
        Probabilities decode to the image of the *expected* code, E[e] = p @ codes, and are differentiable
        (Soft-Di[M]O, arXiv 2509.22925, Eq. 3 with the decoder's table); a one-hot gives exactly the hard image. N may
        be that of any square image. `text` is for text-guided decoders and unused here."""
        soft, table = x.is_floating_point(), self.table
        if (x.dim() != 2 + soft or soft and x.shape[2] != self.V
                or math.isqrt(x.shape[1] // self.S) ** 2 * self.S != x.shape[1]):
            raise ValueError(f'decode expects ids (B, {self.N}) or probabilities (B, {self.N}, {self.V}), '
                             f'got {tuple(x.shape)}')
        return self.decode_latents(x.to(table.dtype) @ table if soft else F.embedding(x, table))

    def forward(self, images, quantise=True):
        """One training pass -> (reconstruction, latents z, quantised q): q = codebook[nearest(z)], and the decoder
        sees z + stopgrad(q - z), the straight-through estimator of VQ-VAE (arXiv 1711.00937 Eq. 3)."""
        z = self.latents(images)
        q = self.codebook(self.nearest(z)) if quantise else z
        return self.decode_latents(z + (q - z).detach()), z, q

    @classmethod
    def from_checkpoint(cls, saved, path=''):
        """Rebuild from what `pack` puts into every checkpoint of ours; `path` says where a published one is now."""
        if 'kind' in saved:
            try:
                tokenizer = cls.from_pretrained(saved['kind'], path or saved['path'], saved['grid'], saved.get('S', 0))
                if tokenizer.source['digest'] != saved.get('digest', tokenizer.source['digest']):
                    raise ValueError(f'{tokenizer.source["path"]}: other weights than this run was made with')
                return tokenizer
            except (ValueError, FileNotFoundError) as error:
                raise SystemExit(f'{error} (a checkpoint names this tokenizer; if it moved: --tokenizer_path=...)'
                                 ) from None
        tokenizer = cls(**saved['args'])
        tokenizer.load_state_dict(saved['net'])
        return tokenizer.eval().requires_grad_(False)

    def digest(self):
        """What its tokens mean, in a word: hash of the weights."""
        digest = hashlib.sha256()
        for name, value in sorted(self.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
        return digest.hexdigest()

    def pack(self):
        """What a checkpoint stores: a small tokenizer itself, of a published one where it is."""
        return self.source or {'args': self.config, 'net': self.state_dict()}

    @classmethod
    def from_pretrained(cls, kind, path, grid=16, S=0):
        """Published weights, kind maskgit (taming VQGAN) or maskbit, from their file, from its folder, or from the
        dict that it holds; path 'random' is the published size with random weights. All sizes are read off the shapes
        but the grid of an image and MaskBit's S (0: as released), which the weights leave open. Errors: ValueError,
        FileNotFoundError, one line."""
        if kind not in PUBLISHED:
            raise ValueError(f'unknown kind {kind!r}; supported: {", ".join(PUBLISHED)}')
        if path == 'random':
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                tokenizer = cls(**PUBLISHED[kind])
        else:
            w, name = read_published(path)
            w = {k: v for k, v in w.items() if not k.startswith('loss.' if kind == 'maskgit' else 'quantize.')}
            size = lambda key, *wanted: shape_of(w, name, f'a {kind} tokenizer', key, *wanted)
            count = lambda pattern: len({m[1] for k in w if (m := re.match(pattern, k))})
            block = 'block' if kind == 'maskgit' else 'res_blocks'
            ch, depth = size('encoder.conv_in.weight', 0, 3, 3, 3)[0], count(r'encoder\.down\.(\d+)\.')
            widths = [size(f'encoder.down.{i}.{block}.0.conv2.weight', 0, 0, 3, 3)[0] for i in range(max(1, depth))]
            if any(c % 32 or c % ch for c in (ch, *widths)):
                raise ValueError(f'{name}: encoder.conv_in.weight and encoder.down have {[ch, *widths]} channels, '
                                 'expected multiples of 32 and of the first. Is this the right file?')
            shape = dict(image_size=grid << len(widths) - 1, ch=ch, ch_mult=','.join(str(c // ch) for c in widths),
                         n_res=count(rf'encoder\.down\.0\.{block}\.(\d+)\.'),
                         up=count(rf'decoder\.up\.0\.{block}\.(\d+)\.'), groups=32)
            if kind == 'maskgit':
                n_codes, code_dim = size('quantize.embedding.weight', 0, 0)
                attend = sorted({m[1] for k in w if (m := re.match(r'encoder\.down\.(\d+)\.attn\.', k))})
                shape |= dict(n_codes=n_codes, code_dim=code_dim, mid=2, attention=','.join([*attend, 'mid']),
                              z=size('encoder.conv_out.weight', 0, 0, 3, 3)[0])
            else:
                bits = size('encoder.conv_out.weight', 0, 0, 1, 1)[0]
                S = S or 1 + (bits % 2 == 0)                                             # released: 2 codes per place
                shape |= dict(S=S, n_codes=2 ** (bits // S), code_dim=bits // S,
                              mid=count(r'encoder\.mid\.res_blocks\.(\d+)\.'))
                w['codes'] = bit_rows(bits // S)
            with torch.device('meta'):
                tokenizer = cls(**shape)
            fill(tokenizer, w, lambda key: published_name(key, kind, len(widths)), name)
        if isinstance(path, (str, os.PathLike)):
            path = path if path == 'random' else os.path.abspath(path)
            tokenizer.source = dict(kind=kind, path=path, grid=grid, S=S, digest=tokenizer.digest())
        return tokenizer.eval().requires_grad_(False)


PUBLISHED = {'maskgit': dict(image_size=256, ch=128, ch_mult='1,1,2,2,4', n_res=2, n_codes=1024, code_dim=256, mid=2,
                             up=3, z=256, attention='4,mid', groups=32),
             'maskbit': dict(image_size=256, ch=128, ch_mult='1,1,2,2,4', n_res=2, n_codes=128, code_dim=7, S=2, mid=2,
                             groups=32)}


def published_name(key, kind, depth):
    """Our parameter name -> the name in the published file."""
    if kind == 'maskbit':
        key = key.replace('.block.', '.res_blocks.').replace('downsample', 'down_conv')
        return key.replace('upsample', 'upsample_conv')
    key = re.sub(r'up\.(\d+)', lambda m: f'up.{depth - 1 - int(m[1])}', key)           # taming: full resolution first
    key = re.sub(r'\.mid\.(block|attn)\.(\d)', lambda m: f'.mid.{m[1]}_{int(m[2]) + 1}', key)
    return re.sub(r'sample\.', 'sample.conv.', key).replace('codebook', 'quantize.embedding')


def spread_out(z, k, rng, taken, near=0.0):
    """k rows of z (M, d), each drawn with probability proportional to its squared distance from those already drawn
    and from taken (K, d), K >= 0 (k-means++, Arthur & Vassilvitskii 2007), none below `near`: codes for rare patches
    too, not just for the background."""
    chosen = taken if len(taken) else z[torch.randint(len(z), (1,), generator=rng)]
    distance = torch.cdist(z, chosen).square().amin(1)
    while len(chosen) < len(taken) + k:
        row = z[torch.multinomial(distance * (distance > near) + 1e-12, 1, generator=rng)]
        distance = torch.minimum(distance, (z - row).square().sum(1))
        chosen = torch.cat([chosen, row])
    return chosen[len(taken):]


# -----------------------------------------------------------------------------
# Helpers of every script: overrides, processes, files (model.py passes them on)

RULE = '# ' + '-' * 77
# What settings of these names may be, in every script: one of, at least (precision and recall need 4 images), a share
ALLOWED = dict(teacher=('ours', 'maskgit', 'maskbit'), schedule=('arccos', 'cosine'), relax=('soft', 'gumbel', 'st'),
               weights=('ema', 'net'), law=('', 'maskgit', 'maskbit'), output=('soft', 'tokens'))
LEAST = dict(batch_size=1, micro_batch=0, batch=1, log_every=1, save_every=1, n_eval=4, n_metrics=4, n_reference=4, n=0,
             teacher_steps=1, steps=0, starts=1, iterations=1, best_of=0, top_k=0, n_codes=2, tau=1e-6, tau_soft=1e-6,
             tau_sample=1e-6, n_images=8, D=1, depth=1, n_head=1, disc_width=1, ch=2, n_res=1, image_size=1,
             code_dim=1, reward_batch=2, n_wrong=1, **dict.fromkeys((
                 'generator_lr', 'aux_lr', 'disc_lr', 'reward_lr', 'muon_lr', 'generator_muon', 'aux_muon', 'disc_muon',
                 'weight_decay', 'warmup', 'disc_warmup', 'patience', 'clip', 'image_clip', 'reward_steps',
                 'warmup_free', 'apart'), 0))
SHARES = ('r_init', 'sigma_init', 'r_max', 'p_full', 'p_near', 'p_drop', 'cooldown', 'ramp', 'top_p', 'label_smoothing',
          'beta1', 'beta2', 'ema_decay', 'aux_momentum')


def configure(g, argv=None):
    """Override the lower-case scalar globals in `g` from the command line and return them all as a dict.
    Takes --key=value, --key value and, for a bool, a bare --key; dashes equal underscores; --help prints the block.
    Exits with one line on an unknown key, a wrong type, a value that cannot be, or a stray word."""
    name = os.path.basename(g.get('__file__', 'script'))
    keys = [k for k, v in g.items() if type(v) in (bool, int, float, str) and k[0] != '_'
            and (k == k.lower() or len(k) == 1)]                                         # SIZE is a constant, D is not
    whole = lambda s: int(float(s)) if not s.lstrip('+-').isdigit() and float(s).is_integer() else int(s)
    truth = lambda s: {'true': True, '1': True, 'false': False, '0': False}[s.lower()]
    convert = {bool: truth, int: whole, float: float, str: str}
    words, defaults = list(sys.argv[1:] if argv is None else argv), dict(g)
    while words:
        word = words.pop(0)
        if word in ('--help', '-h'):
            source = open(g['__file__'], encoding='utf-8').read()
            print(f'{g["__doc__"].strip()}\n\nSettings (--name=value):\n{source.split(RULE)[1].strip()}')
            raise SystemExit(0)
        if not word.startswith('--') or len(word) < 3:
            raise SystemExit(f'{name}: stray word {word!r}; settings look like --name=value')
        key, equals, text = word[2:].partition('=')
        key = key.replace('-', '_')
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
            raise SystemExit(f'{name}: unknown setting --{key}; '
                             + (f'did you mean --{near[0]}?' if near else 'see --help for the list'))
        kind = type(g[key])
        if not equals:
            if kind is bool and not (words and words[0].lower() in ('true', 'false', '0', '1')):
                text = 'true'
            elif words and not words[0].startswith('--'):
                text = words.pop(0)
            else:
                raise SystemExit(f'{name}: --{key} needs a value, as in --{key}={defaults[key]}')
        try:
            g[key] = convert[kind](text)
        except (ValueError, KeyError, OverflowError):
            wanted = 'true, false, 1 or 0' if kind is bool else f'a value of type {kind.__name__}'
            raise SystemExit(f'{name}: --{key} takes {wanted} (default {defaults[key]!r}), not {text!r}') from None
    if g.get('data') and g['data'] not in WORLDS:                # a checkpoint names the folder from anywhere
        g['data'] = os.path.abspath(g['data'])
    for key in keys:  # training's bench divides by steps; sample.py's default of 0 is its usual number
        value, least = g[key], 1 if key == 'steps' and g.get('bench') and defaults[key] else LEAST.get(key)
        wanted = (f'one of {", ".join(map(repr, ALLOWED[key]))}' if value not in ALLOWED.get(key, (value,)) else
                  'a name' if value == '' and defaults[key] and key in ('data', 'out_dir', 'ckpt') else
                  'below 2 ** 63' if key == 'seed' and abs(value) >= 2 ** 63 else
                  'a finite number' if type(value) is float and not math.isfinite(value) else
                  f'at least {least:g}' if least is not None and value < least else
                  'between 0 and 1' if key in SHARES and not 0 <= value <= 1 else
                  'below 1' if key in ('beta1', 'beta2') and value == 1 else '')
        if wanted:
            raise SystemExit(f'{name}: --{key}={value} cannot be, expected {wanted}')
    if g.get('teacher') == 'ours' and g.get('teacher_path'):
        raise SystemExit(f'{name}: --teacher_path is for published weights, --teacher=maskgit or maskbit; a teacher of '
                         f'ours is --{"teacher_ckpt" if "teacher_ckpt" in keys else "ckpt"}={g["teacher_path"]}')
    if g.get('p_full', 0) + g.get('p_near', 0) > 1 + 1e-6:
        raise SystemExit(f'{name}: --p_full={g["p_full"]} and --p_near={g["p_near"]} are shares of one whole, above 1')
    return {k: g[k] for k in keys}


def report_error(kind, error, trace):
    """sys.excepthook: Ctrl-C ends with one line, everything else as usual."""
    if kind is KeyboardInterrupt:
        print('stopped', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def start_processes(half=('cuda', 'cpu')):
    """Join the torchrun group, if there is one -> (rank, world, device, autocast). One process per GPU with nccl,
    gloo on the CPU; bf16 autocast on the devices in `half` that compute in it, else float32, and no float16 path."""
    sys.excepthook = report_error
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    cuda = torch.cuda.is_available()
    device = torch.device(f'cuda:{os.environ.get("LOCAL_RANK", 0)}' if cuda else 'cpu')
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group('nccl' if cuda else 'gloo', timeout=timedelta(hours=6))  # rank 0 may train a teacher
    can = getattr(torch.cpu, 'get_capabilities', dict)()                                 # from torch 2.11 on
    can = torch.cuda.is_bf16_supported(including_emulation=False) if cuda else bool(can.get('avx512_bf16'))
    bf16 = can and device.type in half
    if rank == 0:
        reason = '' if can else f', the {"GPU" if cuda else "CPU"} has no bf16'
        print(f'{world} process(es) on {torch.cuda.get_device_name(device) if cuda else "cpu"}: '
              + ('bf16 autocast' if bf16 else f'float32{reason}'))
    return rank, world, device, torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def end_processes():
    """Leave the group together: rank 0 may still be measuring."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def is_rank0():
    return not dist.is_initialized() or dist.get_rank() == 0


def split_batch(batch_size, micro_batch, world):
    """Global batch -> (images per forward on one device, accumulation steps). Exits when it does not divide."""
    micro = micro_batch or max(1, batch_size // world)
    if batch_size % (micro * world):
        best = max(1, round(batch_size / (micro * world))) * micro * world
        raise SystemExit(f'batch_size {batch_size} is not a multiple of {world} process(es) x {micro} per process = '
                         f'{micro * world}; try --batch_size={best}')
    return micro, batch_size // (micro * world)


def rng_for(seed, step, part=0, device='cpu'):
    """The seed rule: one generator per (seed, step, part), part being the micro-batch's number over all processes.
    So a run draws the same numbers on 1 or 8 processes with equal micro-batches, and resuming needs no RNG state."""
    digest = hashlib.sha256(repr((seed, step, part)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], 'little') >> 1)


def apply_gradients(parameters, optimizers, parts, clip=1.0):
    """Divide accumulated gradients by `parts`, average them over all processes with one all-reduce, clip their norm
    (0: no limit), step. -> the norm before the clipping."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    if dist.is_initialized():
        dist.all_reduce(flat)
    flat /= parts
    torch._foreach_copy_(grads, [part.view_as(g) for g, part in zip(grads, flat.split([g.numel() for g in grads]))])
    norm = nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    for optimizer in optimizers:
        optimizer.step()
    return norm


def check_finite(step, **norms):
    """End the run before a broken state is saved; gradient norms by the setting to lower."""
    for name, norm in norms.items():
        if not torch.isfinite(norm):
            raise SystemExit(f'step {step}: a gradient is not finite; lower --{name}. The last checkpoint is good: '
                             '--resume continues from it.')


def same_weights(*networks):
    """Give every process rank 0's weights and buffers."""
    if dist.is_initialized():
        for tensor in (t for n in networks for t in n.state_dict().values()):
            dist.broadcast(tensor, 0)


class Stop:
    """Ctrl-C or SIGTERM asks for a stop at the end of the step, so that the files stay usable; once more stops at once,
    but not within a second: a terminal, torchrun and distill.py may all pass on the same wish."""

    def __init__(self):
        self.asked = 0.0                                         # when
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, self.ask)

    def ask(self, number, frame):
        if self.asked and time.time() - self.asked > 1:
            raise KeyboardInterrupt
        self.asked = self.asked or time.time()

    def now(self, step, device):
        """True once any process was asked; processes agree every 10 steps."""
        if not dist.is_initialized():
            return bool(self.asked)
        if step % 10:
            return False
        flag = torch.tensor(float(self.asked > 0), device=device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


def previous(path):
    return '.prev'.join(os.path.splitext(path))


@contextlib.contextmanager
def writing(path):
    """Make the folder of `path`; inside, a full disk or a missing permission ends the program with one line."""
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        yield
    except (OSError, RuntimeError, ValueError) as error:                                 # of torch.save, of PIL
        raise SystemExit(f'cannot write {path}: {str(error).splitlines()[0]}. Earlier checkpoints are untouched; '
                         'free some space or permissions, or choose another --out_dir (sample.py: --grid, '
                         '--png_dir; tteo.py: --name)') from None


def save_checkpoint(path, state):
    """Write a dict of tensors and plain containers: temporary name, flush to disk, rename; the file that was there is
    kept as *.prev.pt, unless broken. Rank 0 only. Exits with one line if the folder or the disk cannot take it."""
    temporary, older = f'{path}.{os.getpid()}.tmp', f'{path}.{os.getpid()}.prev.tmp'
    if not all(v.isfinite().all() for part in ('net', 'ema') for v in state.get(part, {}).values()):
        raise SystemExit(f'{path}: not written, the weights are not finite at step {state["step"]}; lower the learning '
                         'rates. The last checkpoint is good: --resume continues from it.')
    try:
        with writing(path):
            with open(temporary, 'wb') as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            if zipfile.is_zipfile(path):               # whole; a copy, so that path never lacks
                shutil.copyfile(path, older)
                os.replace(older, previous(path))
            os.replace(temporary, path)
    finally:
        for leftover in glob.glob(f'{glob.escape(path)}.*.tmp'):                         # of a killed run, too
            os.remove(leftover)


def load_checkpoint(path, stage='', hint='', fallback=False):
    """Read a checkpoint of ours onto the CPU without executing code; `stage` is what it must be (words separated by
    '|'). With `fallback` an unreadable newest file is reported and the previous one used. Exits with one line."""
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        problem = 'no such checkpoint'
    except Exception as error:  # torch raises many kinds here
        unsafe = type(error).__name__ == 'UnpicklingError' and os.path.getsize(path) > 0
        problem = ('refused, it holds more than tensors and plain containers (nothing in it was executed)' if unsafe
                   else f'truncated or not a checkpoint ({(str(error) or "empty").splitlines()[0][:80]})')
    else:
        found = state.get('stage') if isinstance(state, dict) else None
        if isinstance(found, str) and (not stage or found in stage.split('|')):
            return state
        problem = (f'is a {found} checkpoint, expected {stage.replace("|", " or ")}' if isinstance(found, str)
                   else 'not a checkpoint of this project (no "stage" entry)')
        fallback = False                                                     # whole, so not what was asked for
    if fallback and os.path.exists(previous(path)):
        print(f'{path}: {problem}; using the previous one, {previous(path)}')
        return load_checkpoint(previous(path), stage, hint)
    raise SystemExit(f'{path}: {problem}. {hint}'.strip())


def load_resumed(path, stage, config):
    """The checkpoint that --resume continues, with a note of the settings in `config` that are not that run's."""
    state = load_checkpoint(path, stage, 'Start without --resume.', fallback=True)
    other = [f'--{k}={v} (it had {state["config"][k]})' for k, v in config.items()
             if state['config'].get(k, v) != v and k not in ('resume', 'bench', 'out_dir')]
    if other and is_rank0():
        print(f'note: {path} continues with {", ".join(other)}')
    return state


class Inert:
    """Stands for every class or function that a published file refers to: nothing is executed. Without arguments it is
    a dict, which the file may fill (Lightning's settings), else an empty object."""

    def __new__(cls, *arguments):
        return object.__new__(cls) if arguments else OrderedDict()

    def __setstate__(self, state):
        pass


def read_published(source):
    """A published file, its folder, or the dict that it holds -> (flat dict of tensors, its name in errors). Nested
    dicts (MaskGIT, Lightning) are opened. A file is mapped into memory, so that an optimizer's state is never read:
    `fill` copies what is kept. Nothing is executed: foreign classes become `Inert`. Raises FileNotFoundError,
    ValueError."""
    if isinstance(source, dict):
        name, state = 'the given dict', source
    else:
        name = os.fspath(source)
        if os.path.isdir(name):
            files = sorted(f for f in os.listdir(name) if f.endswith(('.pth', '.pt', '.bin', '.ckpt')))
            if len(files) != 1:
                raise ValueError(f'{name}: holds {len(files)} weight files {files}, expected one; name the file')
            name = os.path.join(name, files[0])
        if not os.path.isfile(name):
            raise FileNotFoundError(f'{name}: no such file; expected published weights (see README.md)')
        try:
            packed = zipfile.is_zipfile(name)
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(name) if packed else []
            with torch.serialization.safe_globals([(Inert, f) for f in foreign]):
                state = torch.load(name, map_location='cpu', weights_only=True, mmap=packed)
        except Exception as error:  # torch raises many kinds here
            reason = (str(error) or 'empty').splitlines()[0][:90]
            raise ValueError(f'{name}: truncated, not a weight file, or refused as unsafe ({reason}); nothing in it '
                             'was executed. Download it again; if it is whole, save its state dict alone') from None
    for nest in ('model_state_dict', 'state_dict'):
        state = state.get(nest, state) if isinstance(state, dict) else {}
    items = state.items() if isinstance(state, dict) else ()
    tensors = {k: v for k, v in items if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not tensors:
        raise ValueError(f'{name}: holds no tensors by name, expected a state dict')
    return tensors, name


def shape_of(weights, name, what, key, *wanted):
    """The shape of a published tensor, where 0 in `wanted` is any size. Raises ValueError: which file, which key."""
    found = tuple(weights[key].shape) if key in weights else None
    if found is None or len(found) != len(wanted) or any(f != (w or f) or not f for w, f in zip(wanted, found)):
        form = '(' + ', '.join(str(w) if w else '*' for w in wanted) + ')'
        has = f'has shape {found}' if found is not None else f'is missing; the file begins with {next(iter(weights))}'
        raise ValueError(f'{name}: {key}, expected {form} in {what}, {has}. Is this the right file, and whole?')
    return found


def fill(network, weights, rename, name):
    """Put published weights strictly into a network built on the meta device, whose keys `rename` translates.
    Raises ValueError naming the first key that does not fit."""
    wanted = {key: rename(key) for key in network.state_dict()}
    for key, value in network.state_dict().items():
        shape_of(weights, name, type(network).__name__, wanted[key], *value.shape)
    extra = sorted(weights.keys() - wanted.values())
    if extra:
        raise ValueError(f'{name}: {len(extra)} keys that this network has no place for, the first is {extra[0]}. '
                         'Is this the right file?')
    network.load_state_dict({k: weights[w].to(torch.float32, copy=True) for k, w in wanted.items()}, assign=True)
    return network.eval()


def restore(module, weights, path, name):
    """Strict loading that says which file and which keys."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise SystemExit(f'{path}: {name} does not fit this network: {" ".join(lines)} Was it made with other sizes? '
                         'Use the same settings, or another --out_dir.') from None


def restore_optimizers(optimizers, states, path):
    """Loading that says what to do where a run is resumed with other kinds of optimizers; on another device too."""
    try:
        for optimizer, state in zip(optimizers, states, strict=True):
            for group in state['param_groups']:
                if 'fused' in group:
                    group['fused'] = optimizer.defaults['fused']
            optimizer.load_state_dict(state)
    except ValueError as error:
        raise SystemExit(f'{path}: its optimizers do not fit ({error}); resume with the settings of Muon and of frozen '
                         'tables that it was made with') from None


class Log:
    """log.jsonl beside the checkpoint: one JSON object per log line, numbers that follow from the seed only (times go
    to the console), so that a resumed run writes the same lines as an uninterrupted one."""

    def __init__(self, checkpoint, step):
        self.path = os.path.splitext(checkpoint)[0] + '.log.jsonl'
        lines = open(self.path).readlines() if step and os.path.exists(self.path) else []
        with writing(self.path), open(self.path, 'w') as file:  # drop what a crash left behind
            file.writelines(line for line in lines if line.endswith('\n') and json.loads(line)['step'] <= step)

    def write(self, row):
        with writing(self.path), open(self.path, 'a') as file:
            file.write(json.dumps(row) + '\n')


def save_grid(path, images, captions=(), columns=8):
    """Images (n, 3, H, W) in [-1, 1] -> one PNG, `columns` per row, each with its caption below if given."""
    pixels = ((images.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    scale = -(-96 // images.shape[-1])                                       # tiles with room for captions
    width, height = pixels.shape[2] * scale + 4, pixels.shape[1] * scale + 4 + (30 if len(captions) else 0)
    sheet = Image.new('RGB', (columns * width, -(-len(pixels) // columns) * height), 'white')
    pen = ImageDraw.Draw(sheet)
    for k, array in enumerate(pixels):
        x, y = k % columns * width, k // columns * height
        tile = Image.fromarray(array).resize((width - 4, array.shape[0] * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y))
        if len(captions):
            text = '\n'.join(textwrap.wrap(captions[k], width // 6)[:3])
            pen.text((x, y + tile.height + 1), text, fill='black', font_size=9, spacing=0)
    with writing(path):
        sheet.save(path)


def progress(total, desc, initial=0):
    """A progress bar on rank 0 with time left; one line every 20 s where the output is a file."""
    return tqdm(total=total, initial=initial, desc=desc, disable=not is_rank0(), dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 20, maxinterval=30)


def timed(call, repeat, device):
    """Seconds per call of `call`, the device synchronised before and after."""
    sync = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    sync()
    start = time.time()
    for _ in range(repeat):
        call()
    sync()
    return (time.time() - start) / repeat


def report_bench(step, images_per_step, device, autocast):
    """Time 20 calls of `step` after 3 of warm-up and print ms, images/s, share of the matmul peak and peak memory.
    FLOPs are counted by torch over one more step; the peak is a large matmul measured in the same run."""
    import resource
    from torch.utils.flop_counter import FlopCounterMode
    timed(step, 3, device)
    seconds = timed(step, 20, device)
    memory = (torch.cuda.max_memory_allocated() if device.type == 'cuda'
              else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    with FlopCounterMode(display=False) as counter:    # last: torch.compile gives up on code that first runs under it
        step()
    n = 8192 if device.type == 'cuda' else 1536
    with autocast:
        a = torch.randn(n, n, device=device)
        a = a.to(torch.bfloat16) if torch.is_autocast_enabled(device.type) else a
        timed(lambda: a @ a, 3, device)
        peak = 2 * n ** 3 / timed(lambda: a @ a, 5, device)
    flops = counter.get_total_flops()
    if is_rank0():
        print(f'bench: ms_per_step {seconds * 1e3:.1f}, images_per_s {images_per_step / seconds:.1f}, gflop_per_step '
              f'{flops / 1e9:.2f}, peak_gflops {peak / 1e9:.1f}, share_of_peak {flops / seconds / peak:.3f}, '
              f'peak_memory_mb {memory / 2 ** 20:.0f}')


# -----------------------------------------------------------------------------

if __name__ == '__main__':
    config = configure(globals())
    rank, world, device, autocast = start_processes()
    micro, accumulate = split_batch(batch_size, micro_batch, world)
    warmup_free = max(1, min(warmup_free, steps // 2))                        # short runs get a codebook too
    images, out = Images(data, image_size), os.path.join(out_dir, 'tokenizer.pt')
    torch.manual_seed(seed)
    try:
        net = Tokenizer(image_size, ch, ch_mult, n_res, n_codes, code_dim).to(device)
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4,
                                      fused=device.type == 'cuda')
    except (ValueError, ZeroDivisionError) as error:
        raise SystemExit(f'tokenizer.py: {error}') from None
    usage, step, stop = torch.zeros(n_codes, device=device), 0, Stop()
    if resume:
        state = load_resumed(out, 'tokenizer', config)
        restore(net, state['net'], out, 'net')
        restore_optimizers([optimizer], [state['optimizer']], out)
        usage, step = state['usage'].to(device), state['step']
    same_weights(net)
    forward = torch.compile(net) if compile else net
    if rank == 0:
        log = Log(out, step) if not bench else None
        print(f'{sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters, {images.length} images, {net.N} '
              f'tokens of {n_codes} codes, {steps} updates of {batch_size} = {world} x {accumulate} x {micro}')
    base = HELD_OUT if images.is_world else 0
    spread = lambda n: base + np.linspace(0, images.length - 1, min(n, images.length)).astype(int)  # over all classes
    fixed, _ = images.batch(spread(32))

    def update():
        """One training step: gradients over the micro-batches, clip, AdamW. -> (mean |error|, vq loss, grad norm)"""
        quantise = step >= warmup_free
        for group in optimizer.param_groups:
            group['lr'] = lr * min(1, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        optimizer.zero_grad(set_to_none=False)
        for k in range(accumulate):
            rng = rng_for(seed, step, rank * accumulate + k)
            limit = HELD_OUT if images.is_world else images.length
            x = images.batch(torch.randint(limit, (micro,), generator=rng).tolist())[0].to(device)
            with autocast:
                y, z, q = (part.float() for part in forward(x, quantise))                # losses in float32
            vq = F.mse_loss(q, z.detach()) + commitment * F.mse_loss(z, q.detach())      # VQ-VAE Eq. 3
            (F.l1_loss(y, x) + F.mse_loss(y, x) + vq).backward()
            usage.add_(torch.bincount(net.nearest(z.detach()).flatten(), minlength=n_codes))
        norm = apply_gradients(list(net.parameters()), [optimizer], accumulate * world)
        return (y - x).detach().abs().mean(), vq.detach(), norm

    def renew_codes():
        """Set the codebook from fresh encoder outputs or, later, move those codes there which no patch has chosen
        lately or which lie beside a busier one, so that nothing but noise decides between the two."""
        if world > 1:
            dist.all_reduce(usage)
        rng, codes = rng_for(seed, step, -1), net.codebook.weight.data
        x = images.batch(torch.randint(images.length, (min(256, images.length),), generator=rng).tolist())[0]
        with torch.no_grad():
            z = torch.cat([net.latents(part.to(device)).float() for part in x.split(net.batch)]).flatten(0, 1)
        near = apart * (z - codes[net.nearest(z)]).square().sum(1).mean().item()
        beside = (torch.cdist(codes, codes).square() < near) & (usage > usage[:, None])
        dead = (usage < 1) | beside.any(1)
        if step == warmup_free:
            near, dead = 0.0, torch.ones_like(dead)
        if dead.any():
            codes[dead] = spread_out(z.cpu(), int(dead.sum()), rng, codes[~dead].cpu(), near).to(device)
            same_weights(net)                                                # equal but for a last bit, which can grow
        usage.zero_()

    if bench:
        report_bench(update, batch_size, device, autocast)
        raise SystemExit
    bar = progress(steps, 'tokenizer', step)
    while True:
        # Save, show, stop
        ending = step >= steps or stop.now(step, device)
        if world > 1 and (step % save_every == 0 or ending):  # an equal share for each process
            dist.all_reduce(usage)
            usage /= world
        if rank == 0 and (step % save_every == 0 or ending):
            if step:
                save_checkpoint(out, dict(stage='tokenizer', step=step, config=config, args=net.config,
                                          net=net.state_dict(), optimizer=optimizer.state_dict(), usage=usage))
            with torch.no_grad():
                pairs = torch.stack([fixed, net.decode(net.encode(fixed.to(device))).cpu()], 1).flatten(0, 1)
            save_grid(f'{out_dir}/tokenizer.png', pairs)
        if ending:
            break
        # -------------------------------------------------------------------------
        error, vq, norm = update()
        step += 1
        bar.update()
        if rank == 0 and (step % log_every == 0 or step % save_every == 0 or step == steps):
            check_finite(step, lr=norm)
        if step % log_every == 0 and rank == 0:
            row = dict(step=step, error=round(error.item(), 5), vq=round(vq.item(), 5), norm=round(norm.item(), 4),
                       used=int((usage > 0).sum()))
            bar.set_postfix(row, refresh=False)
            log.write(row)
        if step == warmup_free or step > warmup_free and (step % 50 == 0 or step == steps):
            renew_codes()
    if rank == 0:
        bar.close()
        with torch.no_grad():
            held = images.batch(spread(2000))[0]
            ids = torch.cat([net.encode(x.to(device)) for x in held.split(net.batch)])
            again = torch.cat([net.decode(x).cpu() for x in ids.split(net.batch)])
        share = torch.bincount(ids.flatten().cpu(), minlength=n_codes).float() / ids.numel()
        if images.bad:
            print(f'{len(images.bad)} unreadable files were skipped')
        print(f'{len(held)} images: mean absolute error {(again - held).abs().mean():.4f}, codes used '
              f'{(share > 0).sum()} of {n_codes}, perplexity {torch.special.entr(share).sum().exp():.1f} -> {out}')
    end_processes()
