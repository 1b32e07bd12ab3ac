"""
Where images come from and where pictures go: image folders, words to ids, the token cache, grids
and curves.

Images come from a *source*. `Shapes` in world.py draws them, `Folder` and `CaptionedFolder` here
read them, `open_data` chooses, and nobody else asks which kind it is. Another kind of data is one
more class with these members (and two lines in `open_data`):

    data, size              its name or folder; the side of its square images in pixels
    words, caption_length   the vocabulary of its captions (tuple); the most words a caption has
    length, limit           images; training draws indices below `limit`, which may be the larger
    batch(index)            -> images float (B, 3, size, size) in [-1, 1], captions (list of str)
    captions(index)         -> the captions alone, which costs no image
    bad, is_bad(i)          {path: reason} of the files that could not be read; is image i of them?
    key()                   a list, fit for JSON, that changes whenever an image does; it names the
                            token cache

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
import csv
import difflib
import glob
import hashlib
import io
import json
import math
import os
import textwrap
import unicodedata
from collections import Counter
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

METADATA = ('metadata.jsonl', 'metadata.csv')  # Hugging Face's imagefolder: file_name, text
IMAGE_ENDINGS = ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff')
UNKNOWN = '<unknown>'          # stands in the vocabulary of free captions for every word outside it
RARE = 2                       # a word in fewer captions than this is outside
MOST_WORDS = 32_000            # of these vocabularies; the ids must fit 16 bits
LONGEST_CAPTION = 32           # words of a free caption that are read
MOST_FACTS = 500               # words of them that the reader of the metrics learns to tell


# -----------------------------------------------------------------------------
# Sources of images

def open_data(data, size, n_images=50_000, expected=None):
    """The source named `data`: 'shapes' or 'shapes-open', of `n_images` images, or a folder.

    Raises ValueError where it cannot be used, or where its vocabulary is not the one `expected`,
    that of a trained model.
    """
    if data in WORLDS:
        source = Shapes(data, size, n_images)
    elif holds_captions(data):
        source = CaptionedFolder(data, size)
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
        self.files = []                                        # (path, caption)
        for word, paths in groups.items():
            self.files += [(path, word) for path in paths]
        self.length = len(self.files)
        self.limit = self.length
        self.check_files()

    def check_files(self):
        """Say what is wrong with the files, or odd."""
        check_layout(self.data, [path for path, caption in self.files])
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

    def key(self):
        """Every file's name, length in bytes and time of change."""
        key = [self.size]
        for path, caption in self.files:
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

    def reader_examples(self, n):
        """As `examples`: there are no others."""
        return self.examples(n)

    def facts(self, index):
        """Of which class each image is."""
        number = {word: k for k, word in enumerate(self.words)}
        labels = [number[caption] for caption in self.captions(index)]
        return np.eye(len(self.words), dtype=bool)[labels]

    def reference_split(self, n):
        """Two random halves of the folder, the first cut to n (the models were trained on both)."""
        order = np.random.RandomState(0).permutation(self.length)
        reference = order[::2][:n]
        others = order[1::2]
        name = (f'{len(reference)} images of {self.data} (real images: {len(others)} others; '
                'models and reader were trained on both)')
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

    def __init__(self, data, size):
        self.data = data
        self.size = size
        self.bad = {}
        entries = read_captions(data)
        self.files = [(path, caption) for path, caption, category in entries]
        self.length = len(self.files)
        self.limit = self.length
        self.words, self.caption_length = make_vocabulary([caption for path, caption in self.files])
        self.number = {word: k for k, word in enumerate(self.words)}
        self.sort_captions(entries)
        self.check_captions()

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

    def check_captions(self):
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

        say(f'note: {self.data}: {self.length} captions of up to {self.caption_length} words, '
            f'{len(self.words) - 1} different words known')
        if rare:
            say(f'note: {with_rare} captions hold rare words, {len(rare)} in all, such as '
                f'{min(rare)!r}, which are read as {UNKNOWN}')
        if long:
            say(f'note: {len(long)} captions have more than {LONGEST_CAPTION} words and are cut')
        if len(self.sorted_captions) == 1:
            say('note: all captions are the same, so guidance has nothing to steer')
        self.note_left_out()

    def note_left_out(self):
        """Say how many images lie there without a caption."""
        listed = {path for path, caption in self.files}
        left_out = [path for path in find_images(os.path.abspath(self.data)) if path not in listed]
        if left_out:
            say(f'note: {len(left_out)} images in {self.data} are not listed and are left out, '
                f'such as {left_out[0]}')

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
        return [*super().key(), captions, self.words, self.caption_length]

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


def find_images(top):
    """Those of `find_files` whose names end like an image's."""
    return [path for path in find_files(top) if is_image(path)]


def is_image(name):
    return name.lower().endswith(IMAGE_ENDINGS)


def check_layout(data, paths):
    """Raise ValueError where the files of a folder are not laid out as classes: tars, which
    img2dataset makes, or a list of captions in a sub-folder, as Hugging Face splits data sets."""
    tars = [path for path in paths if path.endswith('.tar')]
    if tars and not any(is_image(path) for path in paths):
        raise ValueError(f'--data={data}: no images but {len(tars)} tars, such as '
                         f'{os.path.basename(tars[0])}; unpack them: cd {os.path.dirname(tars[0])} '
                         '&& for t in *.tar; do tar xf "$t"; done')
    lists = [path for path in paths if os.path.basename(path) in METADATA]
    if lists:
        raise ValueError(f'--data={data}: {lists[0]} lists captions, but only of its own folder; '
                         f'give --data={os.path.dirname(lists[0])}')


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


def say(text):
    """One line on the console, by one process, above a progress bar if there is one."""
    if is_rank0():
        tqdm.write(text)


# -----------------------------------------------------------------------------
# Captions of a folder

def holds_captions(data):
    """Are the images of a folder captioned: by a metadata file, or a .txt beside one of them?"""
    for name in METADATA:
        if os.path.isfile(os.path.join(data, name)):
            return True
    for folder, _, names in os.walk(data):
        texts = {name for name in names if name.endswith('.txt')}
        for name in names:
            if is_image(name) and text_beside(name) in texts:
                return True
    return False


def text_beside(path):
    """Where the caption of an image is if there is no list: cat.png -> cat.txt."""
    return os.path.splitext(path)[0] + '.txt'


def read_captions(data):
    """[(path, caption in one line, category or '')] of a captioned folder, each image once.

    Raises ValueError, in one line, for everything that is wrong with the list.
    """
    root = os.path.abspath(data)
    found = [name for name in METADATA if os.path.exists(os.path.join(root, name))]
    if len(found) > 1:
        raise ValueError(f'--data={data}: there are both {found[0]} and {found[1]}; keep one')
    if found:
        origin = os.path.join(root, found[0])
        entries = read_metadata(root, origin)
    else:
        origin = root
        entries = read_texts(root)
    if not entries:
        raise ValueError(f'{origin}: lists no image')
    check_entries(origin, entries)
    return entries


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


def read_texts(root):
    """The entries of a folder with a .txt beside each image."""
    images = find_images(root)
    bare = [path for path in images if not os.path.isfile(text_beside(path))]
    if bare:
        raise ValueError(f'--data={root}: {len(bare)} of {len(images)} images have no .txt beside '
                         f'them, such as {bare[0]}')
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
    """A caption all of whose words must be in `number`. Itself a word (a class label), it stays
    whole. Raises ValueError for an unknown word, naming its nearest neighbours, and where there are
    more than `length` words."""
    words = caption.lower().split()
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
    """Write the good rows of PATH.partial to PATH, one per copy: (M, N + T), and beside it the
    numbers of their images (M,)."""
    if not is_rank0():
        return
    partial = path + '.partial'
    table = np.load(partial, mmap_mode='r')
    good = np.flatnonzero(table[:, -1] == GOOD)
    if len(good) < source.length:
        print(f'{source.length - len(good)} of {source.length} files were skipped')
    rows = table[good, :-1].reshape(-1, tokenizer.N + source.caption_length)
    numbers = good.repeat(len(rows) // max(1, len(good)))      # every copy shows the same image
    new = path + '.tmp'
    with writing(path):
        for target, array in ((numbers_path(path), numbers), (path, rows)):    # the cache last
            with open(new, 'wb') as file:
                np.save(file, array)
            os.replace(new, target)
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
        return tokens, self.source.captions(self.images_of(rows))

    def images_of(self, rows):
        """Which images of the source the rows (B,) show. Raises ValueError."""
        path = numbers_path(self.table.filename)
        if not os.path.exists(path):
            raise ValueError(f'{path}: not there, so the images of {self.table.filename} are unknown; '
                             'delete that file too, it is made again')
        return np.load(path, mmap_mode='r')[rows]


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
