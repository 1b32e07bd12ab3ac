"""
Where images come from: image folders, words to ids, the token cache.

Images come from a *source*. `Shapes` in world.py draws them, `Folder` and `CaptionedFolder` here
read them, `open_data` chooses, and nobody else asks which kind it is. Another kind of data is one
more class with these members (and two lines in `open_data`):

    data, size              its name or folder; the side of its square images in pixels
    words, caption_length   the vocabulary of its captions (tuple); the most words a caption has
    length, limit           images; training draws indices below `limit`, which may be the larger
    batch(index)            -> images float (B, 3, size, size) in [-1, 1], captions (list of str)
    captions(index)         -> the captions alone, which costs no image
    bad, is_bad(i)          {path: reason} of the files that could not be read; is image i of them?
    readable(index, n)      the first n of these indices whose images can be read
    mirrored(caption)       the caption of the mirror image
    key()                   a list, fit for JSON, that changes whenever an image does, and stays if
                            the folder moves; it names the token cache
    digest()                what a checkpoint stores to tell these images from others

    examples(n)             indices of at most n images over all classes, to look at; held out from
                            training where something is
    training_examples(n)    indices of n images, to train a reward on
    test_examples(n)        indices of n images, whose captions are the prompts of a test
    reader_examples(n)      indices of at most n images from which the reader of the metrics learns
    facts(index)            -> what it must read of each, bool array (B, facts)
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
    label_of(caption)       -> int, the number of what those neighbours vote on: a class, a category
                            or the caption itself. Asked only where `judges` is False
    factors(images, captions)     -> {factor: distance in [0, 1] from its known law}, {} where no
                            law is known
"""
import contextlib
import csv
import difflib
import functools
import glob
import hashlib
import io
import json
import math
import os
import textwrap
import unicodedata
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import ThreadPool

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageOps, PngImagePlugin
from tqdm import tqdm

from common.files import digest_of
from common.folders import below, block_digest, is_split, list_folder, other_endings
from common.run import is_rank0, meet, progress, replacing, say, writing
from common.world import WORLDS, Shapes, mirrored

READERS = 8                    # threads that decode files; PIL lets them run in parallel
READ_AT_ONCE = 64              # files that are tried at once
NAMED = 10                     # unreadable files that are named on the console; the rest is counted
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY    # long texts cost no image
warnings.filterwarnings('ignore', module='PIL')                  # nor do odd metadata a line
ZEROS = 2 ** 20                # bytes of an empty token table that are written at once
GOOD, BAD = 1, 2               # last column of a partial token table; 0: this row is still to do

DEEP_ENDINGS = ('.tif', '.tiff', '.pfm')       # of formats that hold grey values of 32 bits
N_DEEP = 64                    # of these are looked at
WHITES = (1, 255, 4095, 65535, 2 ** 31 - 1)    # what white may be there
ORIENTATION = 0x0112           # the EXIF tag, and what turns each of its values upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

METADATA = ('metadata.jsonl', 'metadata.csv')  # Hugging Face's imagefolder: file_name, text
UNKNOWN = '<unknown>'          # stands in the vocabulary of free captions for every word outside it
RARE = 2                       # a word in fewer captions than this is outside
MOST_WORDS = 32_000            # of these vocabularies; the ids must fit 16 bits
LONGEST_CAPTION = 32           # words of a free caption that are read
MOST_FACTS = 500               # words of them that the reader of the metrics learns to tell


# -----------------------------------------------------------------------------
# Sources of images

def open_data(data, size, n_images=50_000, expected=None, out_dir=''):
    """The source named `data`: 'shapes' or 'shapes-open', of `n_images` images, or a folder, of
    which `out_dir`, where the run writes, is no part.

    The classes or words are those that are found, which notes describe, or `expected`, those of a
    trained model. Raises ValueError where the data cannot be used, or lack what is expected.
    """
    if data in WORLDS:
        source = Shapes(data, size, n_images)
        if expected is None and os.path.isdir(data):
            say(f'note: --data={data} is the drawn world; the folder of this name is '
                f'--data=./{data}')
    else:
        listing = list_folder(data, out_dir)
        kind = CaptionedFolder if holds_captions(listing) else Folder
        source = kind(data, size, listing, expected)
    if expected is not None and list(source.words) != list(expected):
        ours = ', '.join(source.words[:4])
        theirs = ', '.join(expected[:4])
        raise ValueError(f'--data={data} has {len(source.words)} words ({ours}, ...), the model '
                         f'knows {len(expected)} ({theirs}, ...); give the data it was trained on')
    return source


class Folder:
    """A folder of images whose sub-folders are classes; the caption of an image is its class.

    Its members are those of every source, see above. A class has at least one readable image, or is
    `expected`. Raises ValueError where there are fewer than 8 files; unless classes are expected
    prints notes on what is left out and on odd classes.
    """

    caption_length = 1         # a class label is one word, whatever it holds
    task_names = ()
    judges = False

    def __init__(self, data, size, listing, expected=None):
        self.open(data, size, listing)
        check_layout(data, listing)
        groups = find_classes(listing)
        chosen = self.readable_classes(groups) if expected is None else expected
        for word in groups:
            if word not in chosen:
                why = 'no image is readable' if expected is None else 'no class of the model'
                listing.leave_out(len(groups[word]), f'in {word} ({why})')
        self.words = tuple(word for word in chosen if word in groups)
        files = []                                             # (path, caption)
        for word in self.words:
            files += [(path, word) for path in groups[word]]
        self.take(files)
        listing.leave_out(len(listing.others), f'not images by their ending '
                          f'({other_endings(listing.others)})')
        if expected is None or len(self.words) == len(expected):
            self.check_files(listing, groups)
        if expected is None:
            self.note_classes(listing)

    def open(self, data, size, listing):
        self.data = data
        self.size = size
        self.root = listing.root
        self.bad = {}
        self.checked = set()                                   # paths that `readable` has read

    def take(self, files):
        """These files, [(path, caption)], are the images."""
        self.files = files
        self.length = len(files)
        self.limit = self.length
        self.white = find_white([path for path, caption in files])

    def readable_classes(self, groups):
        """Those of the classes that have at least one readable image."""
        def has_image(word):
            return any(can_be_read(path, self.size) for path in groups[word])
        with ThreadPoolExecutor(READERS) as pool:
            found = list(pool.map(has_image, groups))
        return [word for word, good in zip(groups, found) if good]

    def check_files(self, listing, groups):
        """Raise ValueError where there are too few."""
        n_files = sum(len(paths) for paths in groups.values())
        left_out = listing.note().removeprefix('note: ')
        if n_files >= 8 and not self.words:
            raise ValueError(f'--data={self.data}: not one of its {n_files} files is a readable '
                             f'image, such as {listing.images[0]}')
        if self.length < 8:
            found = self.length or 'no'
            raise ValueError(f'--data={self.data}: {found} images found, expected at least 8; put '
                             f'images into sub-folders, one per class. {left_out}'.strip())

    def note_classes(self, listing):
        """Say what was left out, and what is odd."""
        if listing.left_out:
            say(listing.note())
        self.note_white()
        if all(is_split(word) for word in self.words):
            say(f'note: {", ".join(self.words)} are taken for classes; if they are the parts of a '
                f'data set, give one of them: --data={os.path.join(self.data, self.words[0])}')
        if len(self.words) == 1:
            say(f'note: {self.data} has a single class, {self.words[0]!r}: captions carry no '
                'information, so guidance has nothing to steer. Use one sub-folder per class if '
                'there are classes.')

    def note_white(self):
        for mode, white in self.white.items():
            kind = 'floats' if mode == 'F' else 'integers'
            say(f'note: {self.data}: grey values that are {kind} of 32 bits go from 0, black, to '
                f'{white}, white, judged by the brightest of at most {N_DEEP} such images')

    def read(self, index):
        """The images at `index` as a list of uint8 (size, size, 3), None where a file is bad.

        A bad file is remembered in `bad`; the first are named.
        """
        paths = [self.files[i][0] for i in index]
        jobs = {}
        with ThreadPoolExecutor(READERS) as pool:
            for path in paths:
                if path not in self.bad and path not in jobs:
                    jobs[path] = pool.submit(read_image, path, self.size, self.white)
        pixels = {}
        for path, job in jobs.items():
            try:
                pixels[path] = job.result()
            except ValueError as error:
                self.bad[path] = str(error)
                if len(self.bad) <= NAMED:
                    tqdm.write(f'skipped {path}: {error}')
                if len(self.bad) == NAMED:
                    tqdm.write('skipped: further unreadable files are only counted')
        return [pixels.get(path) for path in paths]

    def readable(self, index, n):
        """The first n of the images at index whose files can be read; each file is tried once."""
        good = []
        for start in range(0, len(index), READ_AT_ONCE):
            part = [int(i) for i in index[start:start + READ_AT_ONCE]]
            self.read([i for i in part if self.files[i][0] not in self.checked])
            self.checked.update(self.files[i][0] for i in part)
            good += [i for i in part if not self.is_bad(i)]
            if len(good) >= n:
                break
        return good[:n]

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
            path, caption = self.files[i]
            pixels.append(image)
            captions.append(caption)
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)        # (B, 3, size, size)
        return images.float() / 127.5 - 1, captions

    def captions(self, index):
        """index (B,) -> captions, of unreadable files too."""
        captions = []
        for i in index:
            path, caption = self.files[i]
            captions.append(caption)
        return captions

    def is_bad(self, i):
        """True once the file of image i could not be read."""
        path, caption = self.files[i]
        return path in self.bad

    def mirrored(self, caption):
        """A class may be called left, and have a counterpart."""
        other = mirrored(caption)
        return other if other in self.words else caption

    def key(self):
        """How and from what the images are made: of every file its name below the folder and a
        digest, but neither the place of the folder nor any time."""
        return [self.size, self.white, list(self.words), self.contents]

    @functools.cached_property
    def contents(self):
        """A digest of the names and contents of all files."""
        paths = [path for path, caption in self.files]
        total = hashlib.sha256()
        with ThreadPool(READERS) as pool:                      # which queues no million of jobs
            for path, digest in zip(paths, pool.imap(block_digest, paths, chunksize=64)):
                total.update(json.dumps([below(path, self.root), digest]).encode())
        return total.hexdigest()

    def digest(self):
        """Of the list of files, names below the folder and bytes: cheaper than `key`, which reads."""
        return digest_of([(below(path, self.root), os.path.getsize(path)) for path, caption in self.files])

    def examples(self, n):
        """Files lie class by class, so equal steps visit all classes. Nothing is held out."""
        return np.linspace(0, self.length - 1, min(n, self.length)).astype(int)

    def training_examples(self, n):
        """The same steps in float32, which may end on a neighbour of what `examples` gives."""
        return torch.linspace(0, self.length - 1, n).long().numpy()

    def test_examples(self, n):
        """As `examples`, but always n: those of a small folder repeat."""
        return np.linspace(0, self.length - 1, n).astype(int)

    def reader_examples(self, n):
        """As `examples`: there are no others."""
        return self.examples(n)

    def facts(self, index):
        """Of which class each image is."""
        number = {word: k for k, word in enumerate(self.words)}
        labels = [number[caption] for caption in self.captions(index)]
        return np.eye(len(self.words), dtype=bool)[labels]

    def reference_split(self, n):
        """Two random halves of the folder, the first, of readable images, cut to n (the models were
        trained on both). Raises ValueError where one is empty."""
        order = np.random.RandomState(0).permutation(self.length)
        reference = self.readable(order[::2], n)
        others = [i for i in order[1::2] if not self.is_bad(i)]
        if not reference or not self.readable(others, 1):
            raise ValueError(f'--data={self.data}: too few of its {self.length} images are '
                             'readable to measure one half against the other')
        name = (f'{len(reference)} images of {self.data} (real images: {len(others)} others; '
                'models and reader were trained on both)')
        return np.array(reference), np.array(others), name

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

    def label_of(self, caption):
        """The number of the class."""
        return self.words.index(caption)

    def factors(self, images, captions):
        return {}


class CaptionedFolder(Folder):
    """A folder of images with captions in free words: listed in metadata.jsonl or metadata.csv, or
    each in a .txt beside its image.

    The vocabulary is the words of the captions, in lower case and without punctuation, and UNKNOWN
    for the rare ones and for new ones in a prompt; notes say what that leaves. Where the metadata
    name categories, these are what neighbours vote on, else equal captions. Raises ValueError.
    """

    def __init__(self, data, size, listing, expected=None):
        self.open(data, size, listing)
        entries, self.origin = read_captions(data, listing)
        self.take([(path, caption) for path, caption, category in entries])
        self.words, self.caption_length = make_vocabulary([caption for path, caption in self.files])
        self.number = {word: k for k, word in enumerate(self.words)}
        self.sort_captions(entries)
        self.check_captions(quiet=expected is not None)
        if expected is None:
            self.note_left_out(listing)
            self.note_white()

    def sort_captions(self, entries):
        """Number the labels, and sort the different captions by them: those of label k are the
        `label_count[k]` of `sorted_captions` before place `label_end[k]`."""
        label = {}
        for path, caption, category in entries:                # of equal captions the first counts
            label.setdefault(caption, category or caption)
        number = {name: k for k, name in enumerate(sorted(set(label.values())))}
        self.labels = {caption: number[label[caption]] for caption in label}
        pairs = sorted((k, caption) for caption, k in self.labels.items())
        self.sorted_captions = [caption for k, caption in pairs]
        self.label_count = np.bincount([k for k, caption in pairs])
        self.label_end = self.label_count.cumsum()

    def check_captions(self, quiet):
        """Say what is wrong with the captions, or odd, and what becomes of their words."""
        if self.length < 8:
            raise ValueError(f'--data={self.data}: {self.length} captioned images, expected at '
                             'least 8')
        rare = set()
        with_rare = 0
        long = set()
        for path, caption in self.files:
            words = plain_words(caption)
            if len(words) > LONGEST_CAPTION:
                long.add(caption)
            outside = [word for word in words[:LONGEST_CAPTION] if word not in self.number]
            rare.update(outside)
            with_rare += bool(outside)
        NOTED.update(rare, long)                               # `word_ids` need not tell them again
        if quiet:
            return
        say(f'note: {self.data}: {self.length} captions, {self.origin}, of up to '
            f'{self.caption_length} words, {len(self.words) - 1} different words known')
        if rare:
            say(f'note: {with_rare} captions hold rare words, {len(rare)} in all, such as '
                f'{min(rare)!r}, which are read as {UNKNOWN}')
        if long:
            say(f'note: {len(long)} captions have more than {LONGEST_CAPTION} words and are cut')
        if len(self.sorted_captions) == 1:
            say('note: all captions are the same, so guidance has nothing to steer')

    def note_left_out(self, listing):
        """Say which images and other files lie there without meaning."""
        taken = {path for path, caption in self.files}
        unlisted = [path for path in listing.images if path not in taken]
        if unlisted:
            listing.leave_out(len(unlisted), f'images that are not listed, such as {unlisted[0]}')
        captions = {text_beside(path) for path in taken}
        others = [path for path in listing.others
                  if path not in captions and os.path.basename(path) not in METADATA]
        listing.leave_out(len(others), f'not images by their ending ({other_endings(others)})')
        if listing.left_out:
            say(listing.note())

    def mirrored(self, caption):
        return mirrored(caption)

    def facts(self, index):
        """Which of the MOST_FACTS commonest words its caption has."""
        count = Counter()
        for path, caption in self.files:
            count.update(set(known_words(caption, self.number, self.caption_length)))
        count.pop(UNKNOWN, None)
        common = sorted(count, key=lambda word: (-count[word], word))[:MOST_FACTS]
        rows = []
        for caption in self.captions(index):
            words = set(plain_words(caption))
            rows.append([word in words for word in common])
        return np.array(rows, dtype=bool)

    def key(self):
        """Also the captions and how they are read."""
        captions = [caption for path, caption in self.files]
        return [*super().key(), captions, self.caption_length]

    def label_of(self, caption):
        """The number of its category, where there are none of the caption. Raises ValueError for
        one that no image has."""
        if caption not in self.labels:
            raise ValueError(f'--data={self.data}: no image has the caption {caption!r}')
        return self.labels[caption]

    def wrong_caption(self, caption, u):
        """A caption of another category, where there are none another caption, that reads otherwise
        too: two captions of unknown words may be the same to the model. Raises ValueError where
        there is none."""
        label = self.label_of(caption)
        n_own = self.label_count[label]
        start = self.label_end[label] - n_own
        n_others = len(self.sorted_captions) - n_own
        first = int(u[0] * n_others)
        words = known_words(caption, self.number, self.caption_length)
        for k in range(n_others):
            place = (first + k) % n_others
            if place >= start:
                place += n_own                                 # step over those of its label
            other = self.sorted_captions[place]
            if known_words(other, self.number, self.caption_length) != words:
                return other
        raise ValueError(f'--data={self.data}: no caption of another category reads otherwise than '
                         f'{caption!r}, so there is nothing to follow')


def find_classes(listing):
    """{class: its images} of a folder; classes are sub-folders with images, numbers before names.

    A folder without such sub-folders is one class, 'image'.
    """
    groups = {}
    loose = []
    for path in listing.images:
        name, _, inner = below(path, listing.root).partition('/')
        if inner:
            groups.setdefault(name, []).append(path)
        else:
            loose.append(path)
    if not groups and loose:
        return {'image': loose}
    listing.leave_out(len(loose), 'outside the class folders')
    return {name: groups[name] for name in sorted(groups, key=class_order)}


def class_order(name):
    """Sort key: numbers in the order of their values (9 before 10), then all other names."""
    if name.isdecimal():
        return 0, int(name), name
    return 1, 0, name


def check_layout(data, listing):
    """Raise ValueError where the files of a folder are not laid out as classes: tars, which
    img2dataset makes, or a list of captions in a sub-folder, as Hugging Face splits data sets."""
    tars = [path for path in listing.others if path.endswith('.tar')]
    if tars and not listing.images:
        raise ValueError(f'--data={data}: no images but {len(tars)} tars, such as '
                         f'{os.path.basename(tars[0])}; unpack them: cd {os.path.dirname(tars[0])} '
                         '&& for t in *.tar; do tar xf "$t"; done')
    lists = [path for path in listing.others if os.path.basename(path) in METADATA]
    if lists:
        raise ValueError(f'--data={data}: {lists[0]} lists captions, but only of its own folder; '
                         f'give --data={os.path.dirname(lists[0])}')


def can_be_read(path, size):
    try:
        read_image(path, size)
    except ValueError:
        return False
    return True


def read_image(path, size, white=None):
    """One file -> uint8 (size, size, 3); `white` as `find_white` gives it. Raises ValueError with
    the reason if it cannot be read."""
    try:
        with Image.open(path) as image:
            return square_pixels(image, size, white or {})
    except Exception as error:                                 # PIL raises many kinds here
        raise ValueError(f'{type(error).__name__}: {error}') from None


def upright(image):
    """A PIL image turned as its EXIF orientation asks. Metadata that cannot be read turn nothing:
    they never cost an image."""
    image.load()                                               # once: twice would take bad pixels
    with contextlib.suppress(Exception):
        return image.transpose(TURNS[image.getexif()[ORIENTATION]])
    return image


def square_pixels(image, size, white):
    """A PIL image of any mode -> uint8 (size, size, 3): upright, alpha laid on white, the shorter
    side resized to `size` (antialiased bicubic), the centre cut out."""
    top = white_of(image, white)
    image = upright(image)
    if top:
        image = shallow_grey(image, top)
    if image.has_transparency_data:
        canvas = Image.new('RGBA', image.size, 'white')
        image = Image.alpha_composite(canvas, image.convert('RGBA'))
    square = ImageOps.fit(image.convert('RGB'), (size, size), Image.Resampling.BICUBIC)
    return np.asarray(square)


def white_of(image, white):
    """The value of white in a grey PIL image of 16 or 32 bits, 0 for others. Formats say it for
    16 bits (mode I;16, in PNG and PPM also I); for 32 bits `find_white` must."""
    if image.mode.startswith('I;16') or image.mode == 'I' and image.format in ('PNG', 'PPM'):
        return 65535
    if image.mode in ('I', 'F'):
        return white.get(image.mode, 1 if image.mode == 'F' else 65535)
    return 0


def shallow_grey(image, white):
    """A grey PIL image of 16 or 32 bits -> 8 bits. Raises ValueError for NaN, infinity, and values
    far below 0."""
    grey = np.asarray(image, np.float64)
    if not np.isfinite(grey).all():
        raise ValueError('some pixels are no finite numbers')
    if grey.min() < -0.05 * white:
        raise ValueError(f'its values begin at {grey.min():g}, expected grey from 0, black, to {white}, white')
    return Image.fromarray((grey * 255 / white).clip(0, 255).astype(np.uint8))


def find_white(paths):
    """{mode: value of white} of the grey images of 32 bits (mode F or I) in a data set, whose files
    do not say it: that of the usual ones which is nearest to the brightest pixel. One value holds
    for all images, so that they keep their differences."""
    deep = [path for path in paths if path.lower().endswith(DEEP_ENDINGS)]
    spread = np.linspace(0, len(deep) - 1, min(len(deep), N_DEEP)).astype(int)
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(brightest, [deep[k] for k in spread]))
    white = {}
    for mode in sorted({mode for mode, value in found if mode}):
        top = max(value for other, value in found if other == mode)
        ratio = [abs(math.log(usual / max(top, 1))) for usual in WHITES]
        white[mode] = WHITES[int(np.argmin(ratio))]
    return white


def brightest(path):
    """Mode of a grey image of 32 bits, and its largest value but for a thousandth, which may be hot
    pixels; ('', 0) for all other files."""
    with contextlib.suppress(Exception), Image.open(path) as image:
        if image.mode in ('I', 'F'):
            pixels = np.asarray(image, np.float64)
            return image.mode, np.quantile(pixels[np.isfinite(pixels)], 0.999)
    return '', 0


# -----------------------------------------------------------------------------
# Captions of a folder

def holds_captions(listing):
    """Are the images of a folder captioned: by a metadata file, or a .txt beside most of them?"""
    for name in METADATA:
        if os.path.isfile(os.path.join(listing.root, name)):
            return True
    texts = {path for path in listing.others if path.endswith('.txt')}
    with_text = [path for path in listing.images if text_beside(path) in texts]
    return len(with_text) > 0 and 2 * len(with_text) >= len(listing.images)


def text_beside(path):
    """Where the caption of an image is if there is no list: cat.png -> cat.txt."""
    return os.path.splitext(path)[0] + '.txt'


def read_captions(data, listing):
    """[(path, caption in one line, category or '')] of a captioned folder, each image once, and
    where these are from, in words.

    Raises ValueError, in one line, for everything that is wrong with the list.
    """
    root = listing.root
    found = [name for name in METADATA if os.path.exists(os.path.join(root, name))]
    if len(found) > 1:
        raise ValueError(f'--data={data}: there are both {found[0]} and {found[1]}; keep one')
    if found:
        origin = os.path.join(root, found[0])
        entries = read_metadata(root, origin)
    else:
        origin = root
        entries = read_texts(listing)
    if not entries:
        raise ValueError(f'{origin}: lists no image')
    check_entries(origin, entries)
    images = set(listing.images)
    taken = [entry for entry in entries if entry[0] in images]
    name = os.path.basename(origin)
    listing.leave_out(len(entries) - len(taken), f'listed in {name} and no images of the folder '
                      '(by ending, hidden, outside or linked)')
    if not taken:
        raise ValueError(f'{origin}: {listing.note()}; nothing is left')
    if found:
        return taken, f'from {found[0]}'
    return taken, 'from the .txt beside each image (its sub-folders are no classes)'


def read_metadata(root, origin):
    """The entries of metadata.jsonl or metadata.csv."""
    if origin.endswith('.csv'):
        rows = read_csv(origin)
    else:
        rows = read_jsonl(origin)
    entries = []
    for line, row in rows:
        for column in ('file_name', 'text', 'category'):
            value = row.get(column) or ''
            if not isinstance(value, str):
                raise ValueError(f'{origin}, line {line}: {column} is {value!r}, expected text')
        if not row['file_name']:
            raise ValueError(f'{origin}, line {line}: the file_name is empty')
        path = os.path.normpath(os.path.join(root, row['file_name']))
        entries.append((path, one_line(row['text']), one_line(row.get('category'))))
    return entries


def check_columns(path, line, names):
    """Raise ValueError unless file_name and text are among the columns."""
    lacking = [name for name in ('file_name', 'text') if name not in names]
    if lacking:
        raise ValueError(f'{path}, line {line}: no column {" and no column ".join(lacking)}; '
                         f'expected file_name and text, found {", ".join(names) or "none"}')


def read_jsonl(path):
    """[(number of the line, dict)] of a file with one JSON object a line."""
    rows = []
    for line, text in enumerate(read_text(path).split('\n'), 1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'{path}, line {line}: not JSON ({error}); expected an object like '
                             '{"file_name": "1.png", "text": "a cat"}') from None
        if not isinstance(row, dict):
            raise ValueError(f'{path}, line {line}: a JSON {type(row).__name__}, expected an '
                             'object like {"file_name": "1.png", "text": "a cat"}')
        check_columns(path, line, row)
        rows.append((line, row))
    return rows


def read_csv(path):
    """[(number of the line, dict)] of a table whose first line names the columns."""
    table = io.StringIO(read_text(path), newline='')           # a caption may hold line breaks
    reader = csv.DictReader(table, strict=True)
    rows = []
    try:
        if reader.fieldnames:
            check_columns(path, 1, reader.fieldnames)
        for row in reader:
            if None in row:                                    # where csv puts what is too much
                raise ValueError(f'{path}, line {reader.line_num}: more columns than the first '
                                 'line names; a caption with a comma needs quotes')
            rows.append((reader.line_num, row))
    except csv.Error as error:
        raise ValueError(f'{path}, line {reader.line_num}: {error}; is a quote missing there or '
                         'before?') from None
    return rows


def read_texts(listing):
    """The entries of a folder with a .txt beside each image."""
    texts = set(listing.others)
    images = listing.images
    bare = [path for path in images if text_beside(path) not in texts]
    if bare:
        raise ValueError(f'--data={listing.root}: {len(bare)} of {len(images)} images have no .txt '
                         f'beside them, such as {bare[0]}; for captions give all of them one, for '
                         'classes remove these files')
    return [(path, one_line(read_text(text_beside(path))), '') for path in images]


def read_text(path):
    """What a file in UTF-8 says, without the mark that some editors put first."""
    with open(path, 'rb') as file:
        data = file.read()
    try:
        return data.decode('utf-8-sig')
    except UnicodeDecodeError as error:
        line = data.count(b'\n', 0, error.start) + 1
        raise ValueError(f'{path}, line {line}: not UTF-8 (byte {error.start} is '
                         f'{data[error.start]:#04x}); save it as UTF-8') from None


def one_line(text):
    """Text, or None, with single spaces for all white space."""
    return ' '.join((text or '').split())


def check_entries(origin, entries):
    """Raise ValueError for images that are not there or listed twice, captions without a word, and
    categories of some images only."""
    paths = [path for path, caption, category in entries]
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise ValueError(f'{origin}: {len(missing)} of {len(paths)} images are listed and not '
                         f'there, such as {missing[0]}')
    path, times = Counter(paths).most_common(1)[0]
    if times > 1:
        raise ValueError(f'{origin}: {path} is listed {times} times; an image has one caption')
    for path, caption, category in entries:
        if not caption:
            raise ValueError(f'{origin}: {path} has an empty caption')
        if not plain_words(caption):
            raise ValueError(f'{origin}: {path} has a caption without letter or digit, {caption!r}')
    without = [path for path, caption, category in entries if not category]
    if 0 < len(without) < len(entries):
        raise ValueError(f'{origin}: {len(without)} of {len(entries)} images have no category, '
                         f'such as {without[0]}; give all of them one, or none')


# -----------------------------------------------------------------------------
# Words to ids

NOTED = set()                  # unknown words and long captions of which a note has told already


def plain_words(caption):
    """The words of a free caption: lower case; whatever is no letter, accent or digit separates
    two. UNKNOWN stays, so that a caption made of ids can be read again."""
    words = []
    for part in unicodedata.normalize('NFC', caption).lower().split():
        if part.isalnum() or part == UNKNOWN:                  # as most are
            words.append(part)
            continue
        for character in set(part):
            if unicodedata.category(character)[0] not in 'LMN':      # letter, mark, number
                part = part.replace(character, ' ')
        words += part.split()
    return words


def make_vocabulary(captions):
    """Free captions -> the words that at least RARE of them have, sorted, the commonest MOST_WORDS
    at most, then UNKNOWN (a tuple); the most words a caption has."""
    count = Counter()
    longest = 0
    for caption in captions:
        words = plain_words(caption)[:LONGEST_CAPTION]
        count.update(set(words))
        longest = max(longest, len(words))
    count.pop(UNKNOWN, None)
    frequent = [word for word in count if count[word] >= RARE]
    frequent.sort(key=lambda word: (-count[word], word))
    return (*sorted(frequent[:MOST_WORDS]), UNKNOWN), longest


def known_words(caption, number, length):
    """A free caption as a model reads it that knows the words of `number` and UNKNOWN."""
    words = plain_words(caption)[:length]
    return [word if word in number else UNKNOWN for word in words]


def exact_words(caption, number, length):
    """A caption all of whose words must be in `number`; commas and full stops are skipped. Itself a
    word (a class label), it stays whole. Raises ValueError for an unknown word, naming its nearest
    neighbours, and where there are more than `length` words."""
    words = [word.strip('.,;:!?') for word in caption.lower().split()]
    if caption.strip() in number:
        words = [caption.strip()]
    for k, word in enumerate(words):
        if word not in number:
            raise ValueError(f'unknown word {word!r} in {caption!r}; {suggestion(word, number)}')
        if k >= length:
            raise ValueError(f'{caption!r} has {len(words)} words; this model reads at most '
                             f'{length}')
    return words


def word_ids(captions, words, length):
    """Captions -> ids (B, length), filled up with len(words), which means "no word".

    Where the vocabulary has UNKNOWN, a caption may hold any word and be longer than `length`; a
    note tells what is not read. Else ValueError is raised, see `exact_words`.
    """
    number = {word: k for k, word in enumerate(words)}
    free = UNKNOWN in number
    if free:
        note_unread(captions, number, length)
    ids = torch.full((len(captions), length), len(words), dtype=torch.int64)
    for i, caption in enumerate(captions):
        if free:
            read = known_words(caption, number, length)
        else:
            read = exact_words(caption, number, length)
        for k, word in enumerate(read):
            ids[i, k] = number[word]
    return ids


def note_unread(captions, number, length):
    """Print which words of free captions are unknown, and how many captions too long, each once."""
    unknown = []
    long = []
    for caption in captions:
        words = plain_words(caption)
        if len(words) > length and caption not in NOTED:
            NOTED.add(caption)
            long.append(caption)
        for word in words[:length]:
            if word not in number and word not in NOTED:
                NOTED.add(word)
                unknown.append(word)
    if long:
        say(f'note: only the first {length} words are read of {textwrap.shorten(long[0], 60)!r}'
            + and_others(long))
    if unknown:
        say(f'note: {unknown[0]!r} is not among the {len(number) - 1} known words and is read as '
            f'{UNKNOWN}{and_others(unknown)}; {suggestion(unknown[0], number)}')


def and_others(some):
    """How many things there are beside the first."""
    if len(some) == 1:
        return ''
    return f' (and {len(some) - 1} others)'


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
    return f'known: {", ".join(list(words)[:40])}'


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
    integers: tokens, then the ids of the caption's words. `TokenData.draw` gives whole captions.

    With `flips` each image is followed by its mirror image; unreadable files are left out. The file
    is made once, in `folder`, on `device`: processes share the work (all must call this), and an
    interrupted run continues.
    """
    path = cache_path(source, tokenizer, folder, flips)
    if not os.path.exists(path):             # for all processes alike: it appears after they met
        tokenizer.to(device)
        note_other_caches(folder)
        if flips:
            note_mirrored(source)
        create_table(source, tokenizer, path, flips)
        meet()
        fill_table(source, tokenizer, path, batch, flips)
        meet()
        finish_table(source, tokenizer, path)
        meet()
    return np.load(path, mmap_mode='r')


def cache_path(source, tokenizer, folder, flips):
    """The file's name: it carries a hash of the images and of the tokenizer's weights, so that a
    stale cache is never used, and a folder that was moved or touched not encoded again."""
    key = json.dumps([*source.key(), source.length, bool(flips), tokenizer.digest()])
    digest = hashlib.sha256(key.encode()).hexdigest()
    return os.path.join(folder, f'tokens-{digest[:16]}.npy')


def note_other_caches(folder):
    """Say which caches lie there that were made of something else."""
    paths = glob.glob(os.path.join(glob.escape(folder), 'tokens-*.npy'))
    if paths:
        megabytes = sum(os.path.getsize(path) for path in paths) / 1e6
        names = ', '.join(os.path.basename(path) for path in sorted(paths)[:3])
        say(f'note: {folder} holds {len(paths)} token caches of other images, another tokenizer or '
            f'other --flips ({names}: {megabytes:.1f} MB); delete those that you no longer need')


def note_mirrored(source):
    """Say that captions change in a mirror, if they do."""
    changed = []
    for caption in source.captions(range(source.length)):
        if source.mirrored(caption) != caption:
            changed.append(caption)
    if changed:
        say(f'note: --flips: left and right are exchanged in the captions of {len(changed)} mirror '
            f'images, such as {textwrap.shorten(changed[0], 60)!r}')


def id_type(n):
    """The smallest signed integers that hold the ids 0 ... n - 1, a dtype of numpy."""
    return np.min_scalar_type(-n)


def numbers_path(path):
    """The file beside the cache that says which image each row shows."""
    folder, name = os.path.split(path)
    return os.path.join(folder, name.replace('tokens-', 'images-'))


def create_table(source, tokenizer, path, flips):
    """Make PATH.partial unless an interrupted run left it: zeros (length, copies (N + T) + 1).

    A row is an image; its last column is 0 while it is to do, then GOOD or BAD.
    """
    partial = path + '.partial'
    if not is_rank0() or os.path.exists(partial):
        return
    copies = 2 if flips else 1
    columns = copies * (tokenizer.N + source.caption_length) + 1
    ids = id_type(max(tokenizer.V, len(source.words) + 1))
    with replacing(partial) as new:
        np.lib.format.open_memmap(new, 'w+', ids, (source.length, columns))
        reserve(new)


def reserve(path):
    """Write a file of zeros, which has holes as yet, out to the disk. Raises OSError where that is
    full: to read or write a hole of a mapped file would then end the program with a bus error."""
    size = os.path.getsize(path)
    with open(path, 'r+b') as file:
        header = file.read(ZEROS)
        file.seek(0)
        file.write(header)
        while file.tell() < size:
            file.write(bytes(min(ZEROS, size - file.tell())))


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
    views = [(images, captions)]
    if flips:
        views.append((images.flip(-1), [source.mirrored(caption) for caption in captions]))
    parts = []                                                               # each (B, N) or (B, T)
    for view, said in views:
        parts.append(encode_images(tokenizer, view).cpu())
        parts.append(word_ids(said, source.words, source.caption_length))
    rows = torch.cat(parts, 1)                                               # (B, copies (N + T))
    state = [BAD if source.is_bad(i) else GOOD for i in index]
    return np.column_stack([rows.numpy(), state])


def finish_table(source, tokenizer, path):
    """Write the good rows of PATH.partial to PATH, one per copy: (M, N + T), and beside it the
    numbers of their images (M,), -1 - i for the mirror image of i."""
    if not is_rank0():
        return
    partial = path + '.partial'
    table = np.load(partial, mmap_mode='r')
    good = np.flatnonzero(table[:, -1] == GOOD)
    if len(good) < source.length:
        print(f'{source.length - len(good)} of {source.length} files were skipped, as they could '
              'not be read')
    width = tokenizer.N + source.caption_length
    rows = table[good, :-1].reshape(-1, width)
    numbers = good
    if table.shape[1] > width + 1:                             # with mirror images
        numbers = np.column_stack([good, -1 - good]).flatten()
    for target, array in ((numbers_path(path), numbers), (path, rows)):    # the cache last
        with replacing(target) as new, open(new, 'wb') as file:
            np.save(file, array)
    os.remove(partial)


class TokenData:
    """The encoded images of a source: `table` (M, N + T) as `token_data` made it, tokens, then the
    ids of the caption's words."""

    def __init__(self, table, N, source):
        self.table, self.N, self.source = table, N, source

    def __len__(self):
        return len(self.table)

    def draw_rows(self, run, rng):
        """The numbers (B,) of a random micro-batch, sorted: a memory-mapped file likes order."""
        index = torch.randint(len(self.table), (run.micro,), generator=rng, device=run.device)
        return index.sort().values.cpu().numpy()

    def read(self, rows, device):
        """-> tokens (B, N), ids of the captions' words (B, T)."""
        ids = torch.from_numpy(self.table[rows]).long().to(device)
        return ids[:, :self.N], ids[:, self.N:]

    def draw_ids(self, run, rng):
        """A random micro-batch as `read` gives it."""
        return self.read(self.draw_rows(run, rng), run.device)

    def draw(self, run, rng):
        """A random micro-batch -> tokens (B, N), captions, whole ones: ids have lost rare words."""
        rows = self.draw_rows(run, rng)
        tokens, _ = self.read(rows, run.device)
        return tokens, self.captions_at(rows)

    def captions_at(self, rows):
        """The whole captions of rows (B,), of mirror images mirrored."""
        numbers = self.images_of(rows)
        captions = self.source.captions(np.maximum(numbers, -1 - numbers))
        for k in np.flatnonzero(numbers < 0):
            captions[k] = self.source.mirrored(captions[k])
        return captions

    def images_of(self, rows):
        """Which images i of the source the rows (B,) show, -1 - i if mirrored. Raises
        ValueError."""
        path = numbers_path(self.table.filename)
        if not os.path.exists(path):
            raise ValueError(f'{path}: not there, so the images of {self.table.filename} are unknown; '
                             'delete that file too, it is made again')
        return np.load(path, mmap_mode='r')[rows]
