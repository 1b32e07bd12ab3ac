"""
What a data folder holds. One rule says which files are its images:

    its name ends like an image's,
    no part of its path below the data folder begins with '.', '@' or '__',
    runs of ours do not write into its folder: it is not --out_dir, nor holds the log of a run,
    and it was not met before: links are followed, but no file or folder counts twice.

What the rule leaves out is counted by reason. All that reads a data folder asks `list_folder`.
"""
import hashlib
import os
from collections import Counter

COMPRESSED = (
    '.png', '.apng', '.jpg', '.jpeg', '.jpe', '.jfif', '.webp', '.avif', '.jp2', '.gif', '.qoi')
UNCOMPRESSED = (               # often
    '.bmp', '.dib', '.tif', '.tiff', '.tga', '.ppm', '.pgm', '.pbm', '.pnm', '.pfm')
IMAGE_ENDINGS = COMPRESSED + UNCOMPRESSED
HIDDEN = ('.', '@', '__')      # of editors, of file servers (@eaDir), of archives (__MACOSX)
RUN_LOG = '.log.jsonl'         # every training run of ours writes one, from its start
SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'test', 'testing', 'dev', 'eval')

MOST_ABOUT = 10_000            # bytes of the file that says what drew a folder of images
BLOCK = 4096                   # bytes that the digest of a file reads at once
N_BLOCKS = 8                   # of a large compressed image; of others all


class Listing:
    """A data folder as the rule sees it: `root`, its absolute path; `images` and `others`, the
    sorted paths of its files; `left_out`, {reason: how many}, to which its readers add theirs."""

    def __init__(self, root, own):
        self.root = root
        self.own = own                                         # the real path of --out_dir
        self.left_out = Counter()
        self.files = {}                                        # {real path: path below root}
        self.folders = set()                                   # real paths
        self.links = []                                        # not yet followed
        self.visit(root, os.path.realpath(root))
        for path in self.links:                                # which grows: links behind links
            self.follow(path)
        paths = sorted(self.files.values())
        self.images = [path for path in paths if is_image(path)]
        self.others = [path for path in paths if not is_image(path)]

    def visit(self, folder, real):
        """Take in a folder, whose real path is `real`, and all below it; links wait."""
        waiting = [(folder, real)]
        while waiting:
            folder, real = waiting.pop()
            self.folders.add(real)
            for entry in self.entries(folder, real):
                place = os.path.join(real, entry.name)
                if entry.name.startswith(HIDDEN):
                    self.left_out['hidden'] += 1
                elif entry.is_symlink():
                    self.links.append(entry.path)
                elif entry.is_dir():
                    if place not in self.folders:
                        waiting.append((entry.path, place))
                elif entry.is_file():
                    self.files.setdefault(place, entry.path)
                else:
                    self.left_out['no plain files'] += 1

    def entries(self, folder, real):
        """What is in a folder, sorted by name; where runs write nothing, or, if that is the data
        folder itself, its sub-folders."""
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=os.fspath)
        except OSError:
            self.left_out['folders that cannot be opened'] += 1
            return []
        has_log = any(entry.name.endswith(RUN_LOG) for entry in entries)
        if real != self.own and not has_log and not was_drawn(folder):
            return entries
        if folder != self.root:
            self.left_out[f'folder where runs write ({below(folder, self.root)})'] += 1
            return []
        self.left_out['folder where runs write, the data folder itself: choose another --out_dir'] += 1
        return [entry for entry in entries if entry.is_dir()]

    def follow(self, path):
        """Take in what a link leads to, unless it is there already or lies around the link."""
        real = os.path.realpath(path)
        around = [os.path.realpath(self.root), os.path.realpath(os.path.dirname(path))]
        if real in self.files or real in self.folders or any(is_below(p, real) for p in around):
            self.left_out['links to what is there already'] += 1
        elif os.path.isdir(real):
            self.visit(path, real)
        elif os.path.isfile(real):
            self.files[real] = path
        else:
            self.left_out['dead links'] += 1

    def leave_out(self, n, reason):
        """Count what a reader of the folder does not take."""
        if n:
            self.left_out[reason] += n

    def note(self):
        """What was left out, in one line, '' where nothing was."""
        reasons = [f'{n} {reason}' for reason, n in self.left_out.items()]
        if not reasons:
            return ''
        return f'note: {self.root}: left out: {", ".join(reasons)}'


def list_folder(data, out_dir=''):
    """The Listing of a data folder, without `out_dir` if that lies in it. Raises ValueError."""
    root = os.path.abspath(data)
    if not os.path.isdir(root):
        raise ValueError(f"--data={data}: no such folder; expected 'shapes', 'shapes-open' or a "
                         'folder of images; where a checkpoint names it and it has moved, say with --data where it is')
    if not os.access(root, os.R_OK | os.X_OK):
        raise ValueError(f'--data={data}: may not be read; see its permissions')
    own = os.path.realpath(out_dir) if out_dir else ''
    return Listing(root, own)


def was_drawn(folder):
    """Did sample.py write its images? Then FOLDER.json beside it says what drew them."""
    about = os.path.abspath(folder) + '.json'
    if not os.path.isfile(about) or os.path.getsize(about) > MOST_ABOUT:
        return False
    with open(about, encoding='utf-8', errors='replace') as file:
        text = file.read()
    return all(f'"{key}":' in text for key in ('model', 'network', 'prompts'))


def is_image(path):
    return path.lower().endswith(IMAGE_ENDINGS)


def below(path, root):
    """The part of a path below the folder `root`, with slashes."""
    return path[len(os.path.join(root, '')):].replace(os.sep, '/')


def is_below(path, folder):
    """Is a path that of the folder, or of something in it?"""
    return os.path.join(path, '').startswith(os.path.join(folder, ''))


def other_endings(paths):
    """The commonest endings of files, as '.txt, .json', for a note."""
    endings = Counter()
    for path in paths:
        endings[os.path.splitext(path)[1].lower() or 'no ending'] += 1
    return ', '.join(ending for ending, n in endings.most_common(3))


def is_split(name):
    """Is a folder called as a part of a data set is: train, val2017, Test?"""
    return name.lower().rstrip('0123456789-_') in SPLITS


def block_digest(path):
    """16 letters that change with a file, 'unreadable' of one that may not be read. Of a large image
    8 blocks are read, the first and the last among them: where it is compressed a change goes on to
    the end."""
    if not os.access(path, os.R_OK):
        return 'unreadable'
    size = os.path.getsize(path)
    places = range(0, size, BLOCK)
    if len(places) > N_BLOCKS and not path.lower().endswith(UNCOMPRESSED):
        places = [k * (size - BLOCK) // (N_BLOCKS - 1) for k in range(N_BLOCKS)]
    digest = hashlib.sha256(str(size).encode())
    with open(path, 'rb', buffering=0) as file:
        for place in places:
            file.seek(place)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]
