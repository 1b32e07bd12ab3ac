"""
Where images come from and where pictures go: image folders, words to ids, the token cache, grids
and curves.

Images come from a *source*. `Shapes` in world.py draws them, `Folder` here reads them, `open_data`
chooses, and nobody else asks which kind it is. A third kind of data is one more class with these
members (and two lines in `open_data`):

    data, size              its name or folder; the side of its square images in pixels
    words, caption_length   the vocabulary of its captions (tuple); the most words a caption has
    length, limit           images; training draws indices below `limit`, which may be the larger
    batch(index)            -> images float (B, 3, size, size) in [-1, 1], captions (list of str)
    bad, is_bad(i)          {path: reason} of the files that could not be read; is image i of them?
    key()                   a list, fit for JSON, that changes whenever an image does; it names the
                            token cache

    examples(n)             indices of at most n images over all classes, to look at; held out from
                            training where something is
    training_examples(n)    indices of n images, to train a reward on
    test_examples(n)        indices of n images, whose captions are the prompts of a test
    reference_split(n)      -> indices of at most n images to measure against, indices of others,
                            what to call the first

    wrong_caption(caption, u)     a caption that is not true of its image, chosen by three uniform
                            numbers u
    task_names              the tasks into which captions fall (tuple), () where there are none
    tasks(captions)         -> array of the task of each, '' where there are none; ValueError where
                            a caption cannot be
    judges                  True: `follows` tells by rules what an image shows; False: a vote of
                            its neighbours must
    follows(images, captions)     -> bool array (B,): does each image show its caption? Asked only
                            where `judges` is True
    factors(images, captions)     -> {factor: distance in [0, 1] from its known law}, {} where no
                            law is known
"""
import difflib
import glob
import hashlib
import json
import math
import os
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from common.run import is_rank0, meet, progress, writing
from common.world import WORLDS, Shapes

READERS = 8                    # threads that decode files; PIL lets them run in parallel
GOOD, BAD = 1, 2               # last column of a partial token table; 0: this row is still to do


# -----------------------------------------------------------------------------
# Sources of images

def open_data(data, size, n_images=50_000, expected=None):
    """The source named `data`: 'shapes' or 'shapes-open', of `n_images` images, or a folder.

    Raises ValueError where it cannot be used, or where its vocabulary is not the one `expected`,
    that of a trained model.
    """
    if data in WORLDS:
        source = Shapes(data, size, n_images)
    else:
        source = Folder(data, size)
    if expected is not None and list(source.words) != list(expected):
        ours = ', '.join(source.words[:4])
        theirs = ', '.join(expected[:4])
        raise ValueError(f'--data={data} has {len(source.words)} words ({ours}, ...), the model '
                         f'knows {len(expected)} ({theirs}, ...); give the data it was trained on')
    return source


class Folder:
    """A folder of images whose sub-folders are classes; the caption of an image is its class.

    Its members are those of every source, see above. Raises ValueError where the folder is missing
    or has fewer than 8 files; prints a note on files that are left out and on a single class.
    """

    caption_length = 1         # a class label is one word, whatever it holds
    task_names = ()
    judges = False

    def __init__(self, data, size):
        self.data = data
        self.size = size
        self.bad = {}
        groups = find_classes(data)
        self.words = tuple(groups)
        self.files = []                                        # (path, number of its class)
        for label, paths in enumerate(groups.values()):
            self.files += [(path, label) for path in paths]
        self.length = len(self.files)
        self.limit = self.length
        self.check_files()

    def check_files(self):
        """Say what is wrong with the files, or odd."""
        if self.length < 8:
            found = self.length or 'no'
            raise ValueError(f'--data={self.data}: {found} files found, expected at least 8; put '
                             'images into sub-folders, one per class')
        loose = len(find_files(os.path.abspath(self.data))) - self.length
        if loose:
            print(f'note: {loose} files in {self.data} lie outside its class folders and are left '
                  'out')
        if len(self.words) == 1:
            print(f'note: {self.data} has a single class, {self.words[0]!r}: captions carry no '
                  'information, so guidance has nothing to steer. Use one sub-folder per class if '
                  'there are classes.')

    def read(self, index):
        """The images at `index` as a list of uint8 (size, size, 3), None where a file is bad.

        A bad file is named once and remembered in `bad`.
        """
        paths = [self.files[i][0] for i in index]
        jobs = {}
        with ThreadPoolExecutor(READERS) as pool:
            for path in paths:
                if path not in self.bad and path not in jobs:
                    jobs[path] = pool.submit(read_image, path, self.size)
        pixels = {}
        for path, job in jobs.items():
            try:
                pixels[path] = job.result()
            except ValueError as error:
                self.bad[path] = str(error)
                tqdm.write(f'skipped {path}: {error}')
        return [pixels.get(path) for path in paths]

    def batch(self, index):
        """index (B,) -> images (B, 3, size, size) in [-1, 1], captions.

        An unreadable file, now in `bad`, is replaced by the next readable one. Raises ValueError
        where there is none.
        """
        index = [int(i) for i in index]
        pixels = []
        captions = []
        for i, image in zip(index, self.read(index)):
            while image is None:
                if len(self.bad) == self.length:
                    raise ValueError(f'--data={self.data}: not one of its {self.length} files is a '
                                     'readable image')
                i = (i + 1) % self.length
                image = self.read([i])[0]
            path, label = self.files[i]
            pixels.append(image)
            captions.append(self.words[label])
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)        # (B, 3, size, size)
        return images.float() / 127.5 - 1, captions

    def is_bad(self, i):
        """True once the file of image i could not be read."""
        path, label = self.files[i]
        return path in self.bad

    def key(self):
        """Every file's name, length in bytes and time of change."""
        key = [self.size]
        for path, label in self.files:
            status = os.stat(path)
            key.append([path, status.st_size, status.st_mtime_ns])
        return key

    def examples(self, n):
        """Files lie class by class, so equal steps visit all classes. Nothing is held out."""
        return np.linspace(0, self.length - 1, min(n, self.length)).astype(int)

    def training_examples(self, n):
        """The same steps in float32, which may end on a neighbour of what `examples` gives."""
        return torch.linspace(0, self.length - 1, n).long().numpy()

    def test_examples(self, n):
        """As `examples`, but always n: those of a small folder repeat."""
        return np.linspace(0, self.length - 1, n).astype(int)

    def reference_split(self, n):
        """Two random halves of the folder, the first cut to n (the models were trained on both)."""
        order = np.random.RandomState(0).permutation(self.length)
        reference = order[::2][:n]
        others = order[1::2]
        name = f'{len(reference)} images of {self.data} (real images: {len(others)} others)'
        return reference, others, name

    def wrong_caption(self, caption, u):
        """Another class. There must be two: a reward is not trained on one."""
        others = [word for word in self.words if word != caption]
        return others[int(u[0] * len(others))]

    def tasks(self, captions):
        """Classes are no tasks."""
        return np.array([''] * len(captions))

    def follows(self, images, captions):
        """Never asked (`judges` is False): no rule tells what a photo shows."""
        raise ValueError(f'{self.data}: no rule tells what an image of a folder shows; let its '
                         'neighbours vote')

    def factors(self, images, captions):
        return {}


def find_classes(data):
    """{class: its files} of a folder; classes are sub-folders with files, numbers before names.

    A folder without sub-folders is one class, 'image'. Raises ValueError where it is missing.
    """
    root = os.path.abspath(data)
    if not os.path.isdir(root):
        raise ValueError(f"--data={data}: no such folder; expected 'shapes', 'shapes-open' or a "
                         'folder of images')
    names = []
    for entry in os.scandir(root):
        if entry.is_dir() and not entry.name.startswith('.'):
            names.append(entry.name)
    groups = {}
    for name in sorted(names, key=class_order):
        paths = find_files(os.path.join(root, name))
        if paths:
            groups[name] = paths
    if not groups:
        groups['image'] = find_files(root)
    return groups


def class_order(name):
    """Sort key: numbers in the order of their values (9 before 10), then all other names."""
    if name.isdecimal():
        return 0, int(name), name
    return 1, 0, name


def find_files(top):
    """Sorted paths of all files at any depth below `top`, without hidden files and dead links."""
    paths = []
    for folder, _, names in os.walk(top):
        for name in names:
            path = os.path.join(folder, name)
            if not name.startswith('.') and os.path.isfile(path):
                paths.append(path)
    return sorted(paths)


def read_image(path, size):
    """One file -> uint8 (size, size, 3). Raises ValueError with the reason if it cannot be read."""
    try:
        with Image.open(path) as image:
            return square_pixels(image, size)
    except Exception as error:                                 # PIL raises many kinds here
        raise ValueError(f'{type(error).__name__}: {error}') from None


def square_pixels(image, size):
    """A PIL image of any mode -> uint8 (size, size, 3): upright, alpha laid on white, the shorter
    side resized to `size` (antialiased bicubic), the centre cut out."""
    image = ImageOps.exif_transpose(image)
    if image.mode in ('I', 'F') or image.mode.startswith('I;16'):
        image = shallow_grey(image)
    if image.has_transparency_data:
        white = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(white, image.convert('RGBA'))
    square = ImageOps.fit(image.convert('RGB'), (size, size), Image.Resampling.BICUBIC)
    return np.asarray(square)


def shallow_grey(image):
    """A grey PIL image of 16 or 32 bits (mode I, F or I;16) -> 8 bits.

    Only I;16 says where white is. Else the values tell: white is 65535, 255 or 1, the least that
    none exceeds.
    """
    grey = np.asarray(image, np.float64)
    if ';16' in image.mode or grey.max() > 255:
        white = 65535
    elif grey.max() > 1:
        white = 255
    else:
        white = 1
    return Image.fromarray((grey * 255 / white).clip(0, 255).astype(np.uint8))


# -----------------------------------------------------------------------------
# Words to ids

def word_ids(captions, words, length):
    """Captions -> ids (B, length), filled up with len(words), which means "no word".

    A caption that is itself a word (a class label) stays whole. Raises ValueError for a caption
    that is too long, and for an unknown word, naming its nearest neighbours.
    """
    number = {word: k for k, word in enumerate(words)}
    ids = torch.full((len(captions), length), len(words), dtype=torch.int64)
    for i, caption in enumerate(captions):
        parts = caption.lower().split()
        for whole in (caption.strip(), caption):               # a class may end in a blank
            if whole in number:
                parts = [whole]
        for k, word in enumerate(parts):
            if word not in number:
                raise ValueError(f'unknown word {word!r} in {caption!r}; {suggestion(word, words)}')
            if k >= length:
                raise ValueError(f'{caption!r} has {len(parts)} words; this model reads at most '
                                 f'{length}')
            ids[i, k] = number[word]
    return ids


def captions_of(ids, words):
    """The reverse: condition ids (B, length) -> captions."""
    captions = []
    for row in ids.tolist():
        captions.append(' '.join(words[k] for k in row if k < len(words)))
    return captions


def word_encoder(words, length, device):
    """-> encode(captions) -> condition ids (B, length) on the device."""
    def encode(captions):
        return word_ids(captions, words, length).to(device)
    return encode


def suggestion(word, words):
    """What could have been meant by an unknown word."""
    near = difflib.get_close_matches(word, words, n=3, cutoff=0.3)
    if near:
        return f'nearest known: {", ".join(near)}'
    return f'known: {", ".join(words[:40])}'


# -----------------------------------------------------------------------------
# Images to tokens and back, batch by batch

@torch.no_grad()
def encode_images(tokenizer, images):
    """Images (M, 3, H, W), anywhere -> ids (M, N) on the tokenizer's device, without gradient."""
    device = next(tokenizer.parameters()).device
    ids = [tokenizer.encode(part.to(device)) for part in images.split(tokenizer.batch)]
    return torch.cat(ids)


@torch.no_grad()
def decode_images(tokenizer, tokens, captions):
    """Ids (M, N) on the tokenizer's device, M captions -> images (M, 3, H, W), float32 on the CPU,
    without gradient."""
    images = []
    for start in range(0, len(tokens), tokenizer.batch):
        part = slice(start, start + tokenizer.batch)
        decoded = tokenizer.decode(tokens[part], captions[part])
        images.append(decoded.float().cpu())                   # waits for the device
    return torch.cat(images)


# -----------------------------------------------------------------------------
# The token cache: a data set is encoded once

@torch.no_grad()
def token_data(source, tokenizer, folder, device, batch=256, flips=False):
    """All images of a source as a memory-mapped array (M, N + T) of the smallest sufficient
    integers: tokens, then the ids of the caption's words.

    With `flips` each image is followed by its mirror image; unreadable files are left out. The file
    is made once, in `folder`, on `device`: processes share the work (all must call this), and an
    interrupted run continues.
    """
    path = cache_path(source, tokenizer, folder, flips)
    if not os.path.exists(path):             # for all processes alike: it appears after they met
        tokenizer.to(device)
        create_table(source, tokenizer, path, flips)
        meet()
        fill_table(source, tokenizer, path, batch, flips)
        meet()
        finish_table(source, tokenizer, path)
        meet()
    return np.load(path, mmap_mode='r')


def cache_path(source, tokenizer, folder, flips):
    """The file's name: it carries a hash of the images and of the tokenizer's weights, so that a
    stale cache is never used."""
    key = json.dumps([*source.key(), bool(flips), tokenizer.digest()])
    digest = hashlib.sha256(key.encode()).hexdigest()
    return os.path.join(folder, f'tokens-{digest[:16]}.npy')


def create_table(source, tokenizer, path, flips):
    """Make PATH.partial unless an interrupted run left it: zeros (length, copies (N + T) + 1).

    A row is an image; its last column is 0 while it is to do, then GOOD or BAD.
    """
    partial = path + '.partial'
    if not is_rank0() or os.path.exists(partial):
        return
    copies = 2 if flips else 1
    columns = copies * (tokenizer.N + source.caption_length) + 1
    largest = max(tokenizer.V, len(source.words) + 1)
    smallest_type = np.min_scalar_type(-largest)               # of the signed ones
    new = path + '.tmp'
    with writing(path):
        table = np.lib.format.open_memmap(new, 'w+', smallest_type, (source.length, columns))
        table.flush()
        os.replace(new, partial)


def fill_table(source, tokenizer, path, batch, flips):
    """Encode the rows of PATH.partial that are still to do. Processes take batches in turn."""
    rank = 0
    world = 1
    if dist.is_initialized():
        rank = dist.get_rank()
        world = dist.get_world_size()
    partial = path + '.partial'
    table = np.load(partial, mmap_mode='r')
    bar = progress(source.length, 'encoding images')
    for start in range(rank * batch, source.length, world * batch):
        bar.update(min(world * batch, source.length - start))
        index = np.arange(start, min(start + batch, source.length))
        if table[index, -1].all():
            continue
        rows = encode_rows(source, tokenizer, index, flips).astype(table.dtype)
        with writing(partial), open(partial, 'r+b') as file:
            file.seek(table.offset + start * rows[0].nbytes)   # behind the header
            file.write(rows.tobytes())
    bar.close()


def encode_rows(source, tokenizer, index, flips):
    """Rows of the table for the images at index (B,): int64 (B, copies (N + T) + 1)."""
    images, captions = source.batch(index)
    views = [images]
    if flips:
        views.append(images.flip(-1))
    ids = [encode_images(tokenizer, view) for view in views]
    ids = torch.stack(ids, 1).cpu()                                          # (B, copies, N)
    cond = word_ids(captions, source.words, source.caption_length)           # (B, T)
    cond = cond[:, None].expand(-1, len(views), -1)                          # (B, copies, T)
    rows = torch.cat([ids, cond], 2).flatten(1)                              # (B, copies (N + T))
    state = [BAD if source.is_bad(i) else GOOD for i in index]
    return np.column_stack([rows.numpy(), state])


def finish_table(source, tokenizer, path):
    """Write the good rows of PATH.partial to PATH, one per copy: (M, N + T)."""
    if not is_rank0():
        return
    partial = path + '.partial'
    table = np.load(partial, mmap_mode='r')
    good = np.flatnonzero(table[:, -1] == GOOD)
    if len(good) < source.length:
        print(f'{source.length - len(good)} of {source.length} files were skipped')
    new = path + '.tmp'
    with writing(path):
        with open(new, 'wb') as file:
            np.save(file, table[good, :-1].reshape(-1, tokenizer.N + source.caption_length))
        os.replace(new, path)
        os.remove(partial)


class TokenData:
    """The encoded images: `table` (M, N + T) as `token_data` makes it, tokens, then the ids of the
    caption's words."""

    def __init__(self, table, N, words):
        self.table, self.N, self.words = table, N, words

    def __len__(self):
        return len(self.table)

    def draw_ids(self, run, rng):
        """A random micro-batch -> tokens (B, N), ids of the captions' words (B, T), on the
        device."""
        index = torch.randint(len(self.table), (run.micro,), generator=rng, device=run.device)
        index = index.sort().values                    # a memory-mapped file likes order
        rows = torch.from_numpy(self.table[index.cpu().numpy()]).long().to(run.device)
        return rows[:, :self.N], rows[:, self.N:]

    def draw(self, run, rng):
        """The same -> tokens (B, N), captions."""
        tokens, ids = self.draw_ids(run, rng)
        return tokens, captions_of(ids, self.words)


# -----------------------------------------------------------------------------
# Pictures

def save_grid(path, images, captions=(), columns=8):
    """Images (n, 3, H, W) in [-1, 1] -> one PNG, `columns` per row, each with its caption below if
    captions are given."""
    images = images.detach().float().cpu().clamp(-1, 1)
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()   # (n, H, W, 3)
    n, H, W, _ = pixels.shape
    scale = math.ceil(96 / W)                                  # tiles with room for captions
    gap = 4
    room = 30 if len(captions) else 0                          # three lines of text
    width = W * scale + gap
    height = H * scale + gap + room
    rows = math.ceil(n / columns)
    sheet = Image.new('RGB', (columns * width, rows * height), 'white')
    pen = ImageDraw.Draw(sheet)
    for k, array in enumerate(pixels):
        x = k % columns * width
        y = k // columns * height
        tile = Image.fromarray(array).resize((W * scale, H * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y))
        if len(captions):
            lines = textwrap.wrap(captions[k], width // 6)     # a letter is about 6 pixels wide
            text = '\n'.join(lines[:3])
            pen.text((x, y + tile.height + 1), text, fill='black', font_size=9, spacing=0)
    with writing(path):
        sheet.save(path)


def write_pngs(folder, images, captions):
    """One PNG per image, 00000.png ..., and captions.txt with one line each; an earlier call's are
    replaced."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    names = os.path.join(folder, 'captions.txt')
    with writing(names):
        if os.path.exists(names):
            for old in glob.glob(glob.escape(folder) + '/[0-9][0-9][0-9][0-9][0-9].png'):
                os.remove(old)
        for k, array in enumerate(pixels):
            Image.fromarray(array).save(os.path.join(folder, f'{k:05d}.png'))
        with open(names, 'w', encoding='utf-8') as file:
            file.writelines(f'{k:05d}.png\t{caption}\n' for k, caption in enumerate(captions))


def save_curve(path, curves, label):
    """{name: [(passes, value)]}, at most four -> a PNG with one line each, `label` above."""
    W, H = 560, 360
    left, right, top, bottom = 60, 20, 30, 50                  # margins
    colors = ('crimson', 'royalblue', 'seagreen', 'black')
    xs = [x for line in curves.values() for x, y in line]
    ys = [y for line in curves.values() for x, y in line]
    x_min = min(xs)
    y_min = min(ys)
    x_span = max(max(xs), x_min + 1e-6) - x_min                # never 0
    y_span = max(max(ys), y_min + 1e-6) - y_min

    def place(x, y):
        """A point of the curve -> pixels; the picture's rows count downwards."""
        return (left + (x - x_min) / x_span * (W - left - right),
                H - bottom - (y - y_min) / y_span * (H - top - bottom))

    sheet = Image.new('RGB', (W, H), 'white')
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((left, top, W - right, H - bottom), outline='gray')
    for k in range(5):                                         # numbers at both axes
        x = x_min + k / 4 * x_span
        y = y_min + k / 4 * y_span
        column, row = place(x, y)
        pen.text((column - 8, H - bottom + 6), f'{x:.0f}', fill='black')
        pen.text((16, row - 6), f'{y:.3f}', fill='black')
    pen.text((W // 2 - 120, H - 24), 'network-plus-decoder passes per image', fill='black')
    pen.text((left + 2, 12), label, fill='black')
    for k, (name, color) in enumerate(zip(curves, colors)):
        points = [place(x, y) for x, y in curves[name]]
        pen.line(points, fill=color, width=2)
        pen.text((W - 200, H - 110 + 14 * k), name, fill=color)
    with writing(path):
        sheet.save(path)
