"""
Published files, read safely: nothing in a file is ever executed, and what it says is looked at before it is believed.

In order: the network in what a file holds; the file meant by a path; safetensors, and files of torch.save; a network
filled with the weights, which memory holds once.
"""
import ctypes
import io
import json
import math
import mmap
import os
import pickle
import re
import zipfile

import numpy as np
import torch

from common.files import check_weight, check_kind, first_line, is_big_endian, is_pickle, odd_kind, printable
from common.run import is_rank0

WEIGHT_FILES = ('.safetensors', '.pth', '.pt', '.bin', '.ckpt')
INDEX_FILE = re.compile(r'\.(safetensors|bin)\.index(\.(fp16|bf16))?\.json$')
SHARD = re.compile(r'-(\d+)-of-(\d+)\.')               # model-00001-of-00003.safetensors
HALF = re.compile(r'[._-](fp16|bf16)[._-]')             # model.fp16.safetensors
USUAL_NAMES = ('model.', 'pytorch_model.', 'diffusion_pytorch_model.')


def read_published(source, part='', landmarks=()):
    """A published file, its folder, or the dict that it holds -> (flat dict of tensors, its name in
    errors). Read are safetensors, files of torch.save and shards. `landmarks` are names of which
    the network has one: it is found by it in nested dicts and behind a prefix (`find_network`).
    Tensors of a file are mapped, not read: `fill` copies them, and nobody may write to them. `part`
    is the sub-folder meant where a folder holds several networks: an error names it. Raises
    FileNotFoundError, ValueError."""
    if isinstance(source, dict):
        name, state = 'the given dict', source
    else:
        name = weight_file(os.fspath(source), part)
        state = read_weights(name)
    tensors = find_network(state, landmarks, name)
    if not tensors:
        raise ValueError(f'{name}: holds no tensors by name, expected a state dict')
    empty = [key for key, value in tensors.items() if value.is_meta]
    if empty and (state is not source or len(empty) < len(tensors)):   # a dict of shapes alone is one
        raise ValueError(f'{name}: {empty[0]} is a meta tensor, a shape without numbers; save the '
                         'weights themselves')
    return tensors, name


# Where in a file the network is

def find_network(state, landmarks, name):
    """The tensors by name of the network that has one of the `landmarks`, or, where there is none
    such, of the largest dict of tensors; {} where there are none. It may lie in dicts of any name
    (state_dict, model_ema, ...), and all its names may begin with a prefix (module., _orig_mod.,
    model., ...). Of several an average over training is taken, else the shortest prefix. Raises
    ValueError where one of its tensors is odd."""
    nests = dicts_of_tensors(state)
    found = {}
    for landmark in landmarks:
        for place, tensors in nests.items():
            for key in tensors:
                if f'.{key}'.endswith(f'.{landmark}'):
                    prefix = key[:len(key) - len(landmark)]
                    found[place + prefix] = with_prefix(tensors, prefix)
        if found:
            break
    if not found and nests:
        found = {'': max(nests.values(), key=len)}
    if not found:
        return {}
    chosen = min(found, key=by_preference)
    if len(found) > 1 and is_rank0():
        listed = ', '.join(place or '(no prefix)' for place in found)
        print(f'note: {name}: holds this network {len(found)} times: {printable(listed, 200)}; '
              f'{printable(chosen) or "(no prefix)"} is taken; for another save its state dict alone')
    plain = {}
    for key, value in found[chosen].items():
        odd = value.kind if isinstance(value, OddTensor) else odd_kind(value)
        if odd and landmarks:
            raise ValueError(f'{name}: {key} is {odd}, expected a plain tensor; take the weights as '
                             'float32, float16 or bfloat16')
        if not odd:
            plain[key] = value
    return plain


def by_preference(place):
    return 'ema' not in place.lower(), place.count('.')


def with_prefix(tensors, prefix):
    """Those whose names begin with the prefix, without it."""
    return {key[len(prefix):]: tensors[key] for key in tensors if key.startswith(prefix)}


def is_tensor(value):
    return isinstance(value, (torch.Tensor, OddTensor))


def dicts_of_tensors(state):
    """{place: tensors by name} of a dict and of all dicts in it that hold some; a place ends in a
    dot, the first is ''. Names are made printable here, once: no name of a network changes by it."""
    nests, seen = {}, set()
    waiting = [('', state)]
    while waiting:
        place, nest = waiting.pop(0)
        if isinstance(nest, (list, tuple)):
            nest = dict(enumerate(nest))
        if not isinstance(nest, dict) or id(nest) in seen:
            continue
        seen.add(id(nest))
        tensors = {}
        for key, value in nest.items():
            if not is_tensor(value):
                waiting.append((f'{place}{printable(key, 50)}.', value))
            elif isinstance(key, str):
                tensors[printable(key, 200)] = value
        if tensors:
            nests[place] = tensors
    return nests


# Which file

def weight_file(path, part=''):
    """A file, or the one of a folder that holds all weights, or the index of their shards. Raises
    FileNotFoundError, ValueError."""
    if os.path.isdir(path):
        path = os.path.join(path, choose_file(path, part))
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{printable(path, 500)}: no such file; expected published weights '
                                '(see README.md)')
    return path


def choose_file(folder, part):
    """Full precision before fp16 and bf16, safetensors before .bin, a usual name before others, one
    file before an index of shards. Raises ValueError unless one is left."""
    left = weight_names(folder) or first_shards(folder)
    if not left:
        raise ValueError(no_weights(folder, part))
    for is_better in (is_full, is_safetensors, is_usual, is_whole):
        better = [name for name in left if is_better(name)]
        left = better or left
    if len(left) > 1:
        raise ValueError(f'{folder}: holds {len(left)} weight files {left}, expected one; '
                         'name the file')
    return left[0]


def weight_names(folder):
    """The files of a folder that hold, or list, all weights of a network."""
    names = []
    for name in sorted(os.listdir(folder)):
        whole = name.endswith(WEIGHT_FILES) and not SHARD.search(name)
        if whole or INDEX_FILE.search(name):
            names.append(name)
    return names


def first_shards(folder):
    """The first file of each set of shards that has no index."""
    names = []
    for name in sorted(os.listdir(folder)):
        shard = SHARD.search(name)
        if shard and int(shard[1]) == 1 and name.endswith(WEIGHT_FILES):
            names.append(name)
    return names


def is_full(name):
    return not HALF.search(name)


def is_safetensors(name):
    return '.safetensors' in name


def is_usual(name):
    return name.startswith(USUAL_NAMES)


def is_whole(name):
    return not name.endswith('.json')


def no_weights(folder, part):
    """What is wrong with a folder that has no weights: it lacks the first of its shards, or its
    sub-folders hold the weights, as in the layout of diffusers."""
    shards = [name for name in sorted(os.listdir(folder)) if SHARD.search(name)]
    if shards:
        return (f'{folder}: holds shards of weights such as {shards[0]}, but neither the first of '
                'them nor the index that lists them (its name ends in .index.json); download these')
    inside = []
    for name in sorted(os.listdir(folder)):
        below = os.path.join(folder, name)
        if os.path.isdir(below) and weight_names(below):
            inside.append(name)
    if part in inside:
        return (f'{folder}: holds no weight files, but its sub-folder {part} does: '
                f'name {os.path.join(folder, part)}')
    if inside:
        return (f'{folder}: holds no weight files, but these sub-folders do: {", ".join(inside)}; '
                f'name one, such as {os.path.join(folder, inside[0])}')
    return f'{folder}: holds no weight files, expected one ending in {", ".join(WEIGHT_FILES)}'


# What it holds

def read_weights(path):
    """What a weight file holds, or all files of an index or of a set of shards. Raises ValueError,
    FileNotFoundError."""
    if path.endswith('.json'):
        refuse_pointer(path)
        return read_shards(path)
    if SHARD.search(os.path.basename(path)):
        return read_numbered(path)
    return read_file(path)


def read_file(path):
    refuse_pointer(path)
    if path.endswith('.safetensors'):
        return read_safetensors(path)
    return read_torch(path)


def refuse_pointer(path):
    with open(path, 'rb') as file:
        if file.read(23) == b'version https://git-lfs':
            raise ValueError(f'{path}: is a pointer of Git LFS and not the weights; fetch them '
                             'with: git lfs pull')


def read_numbered(path):
    """All of model-00001-of-00003.bin, -00002-, -00003-, where one of them is named."""
    folder, name = os.path.split(path)
    shard = SHARD.search(name)
    tensors = {}
    for number in range(1, int(shard[2]) + 1):
        digits = str(number).zfill(len(shard[1]))
        one = os.path.join(folder, name[:shard.start(1)] + digits + name[shard.end(1):])
        try:
            if not os.path.isfile(one):
                raise ValueError(f'{os.path.basename(one)} is missing; download it, too')
            tensors.update(read_file(one))
        except (ValueError, TypeError) as error:
            raise ValueError(f'{path}: is read with all shards of its number, as no index lists '
                             f'them: {error}') from None
    return tensors


def read_shards(path):
    """All files that an index lists; its "weight_map" says which tensor is in which. Raises
    ValueError, or FileNotFoundError naming the file that is missing."""
    form = 'expected JSON with "weight_map": {tensor: file in this folder}'
    try:
        with open(path, encoding='utf-8') as file:
            places = json.load(file)['weight_map']
        shards = sorted(set(places.values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise ValueError(f'{path}: no index of shards, {form}. Download it again') from None
    tensors = {}
    for shard in shards:
        in_this_folder = isinstance(shard, str) and os.path.basename(shard) == shard
        if not in_this_folder or not shard.endswith(WEIGHT_FILES):
            raise ValueError(f'{path}: names the file {printable(repr(shard))}, {form}')
        shard_path = os.path.join(os.path.dirname(path), shard)
        if not os.path.isfile(shard_path):
            raise FileNotFoundError(f'{path}: lists {printable(shard)}, which is missing in this '
                                    f'folder ({len(shards)} files in all); download it, too')
        tensors.update(read_file(shard_path))
    for key, shard in places.items():
        if key not in tensors:
            raise ValueError(f'{path}: {printable(key)} should be in {printable(shard)} and is '
                             'not; are all files of one release?')
    return tensors


SAFETENSORS = {
    'F64': torch.float64, 'F32': torch.float32, 'F16': torch.float16, 'BF16': torch.bfloat16,
    'I64': torch.int64, 'I32': torch.int32, 'I16': torch.int16, 'I8': torch.int8,
    'U8': torch.uint8, 'BOOL': torch.bool,
}
LONGEST_HEADER = 100_000_000                              # bytes, a limit of the format
MOST_NUMBERS = 2 ** 60                                    # more overflow torch's strides


def read_safetensors(path):
    """The tensors by name of a safetensors file: 8 bytes that count those of the header, the header,
    then the bytes of all tensors without a gap. These are mapped into memory. Raises ValueError
    naming file and tensor."""
    size = os.path.getsize(path)
    with open(path, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f'{path}: cut off, or no safetensors file: it has {size} bytes, and its '
                             f'header should have {length}. Download it again')
        header = file.read(length)
    entries = safetensors_entries(path, header)
    data = np.empty(0, np.uint8)
    if size > 8 + length:
        data = np.memmap(path, np.uint8, 'c', 8 + length)      # 'c': privately, the file is safe
    tensors, position = {}, 0
    for begin, end, name, dtype, shape in entries:
        if begin != position or end > len(data):
            raise ValueError(f'{path}: {printable(name)} should be bytes {begin} to {end}, expected '
                             f'a begin at {position} and an end within {len(data)}; the file is cut '
                             'off or its header wrong. Download it again')
        if begin == end:
            tensors[name] = torch.empty(shape, dtype=dtype)
        else:
            tensors[name] = torch.from_numpy(data[begin:end]).view(dtype).view(shape)
        position = end
    if position != len(data):
        raise ValueError(f'{path}: the last {len(data) - position} bytes are no tensor of its '
                         'header. Download it again')
    mark_mapped(tensors, path)
    return tensors


def safetensors_entries(path, header):
    """The header of a safetensors file, bytes of JSON -> [(first byte, end, name, dtype, shape)] in
    the order of the bytes. Raises ValueError."""
    try:
        listed = json.loads(header)
    except (ValueError, RecursionError):
        listed = None
    if not isinstance(listed, dict):
        raise ValueError(f'{path}: its header is not the JSON of a safetensors file. Download it '
                         'again')
    entries = []
    for name, entry in listed.items():
        if name != '__metadata__':
            dtype, shape, begin, end = safetensors_entry(path, name, entry)
            entries.append((begin, end, name, dtype, shape))
    return sorted(entries)                                # names are unique: no dtype is compared


def safetensors_entry(path, name, entry):
    """One tensor of the header -> dtype, shape, first byte, end. Raises ValueError where these do
    not agree."""
    place = f'{path}: its header says {printable(entry)} of {printable(name)}'
    try:
        letters, shape, (begin, end) = entry['dtype'], entry['shape'], entry['data_offsets']
        numbers = [*shape, begin, end]
        known = letters in SAFETENSORS
    except (TypeError, KeyError, ValueError):
        raise ValueError(f'{place}, expected dtype, shape and data_offsets. Download it '
                         'again') from None
    if not known:
        raise ValueError(f'{place}, expected a dtype of {", ".join(SAFETENSORS)}; take the same '
                         'weights in another precision')
    dtype = SAFETENSORS[letters]
    counts = all(type(number) is int and number >= 0 for number in numbers)
    fits = counts and math.prod(shape) * dtype.itemsize == end - begin
    if not fits or math.prod(size for size in shape if size) > MOST_NUMBERS:
        raise ValueError(f'{place}, expected a shape that fits its bytes. Download it again')
    return dtype, shape, begin, end


# Files of torch.save: a zip of one pickle and the bytes of each storage

STORAGES = {
    'DoubleStorage': torch.float64, 'FloatStorage': torch.float32, 'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16, 'LongStorage': torch.int64, 'IntStorage': torch.int32,
    'ShortStorage': torch.int16, 'CharStorage': torch.int8, 'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool, 'ComplexFloatStorage': torch.complex64,
    'ComplexDoubleStorage': torch.complex128, 'UntypedStorage': torch.uint8,
}
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class Inert(dict):
    """Stands for every class and function that a file refers to, OrderedDict among them: nothing is
    executed. It takes whatever a pickle does to an object, and keeps what is put into it by name."""

    def __new__(cls, *arguments, **named):
        return dict.__new__(cls)

    def __init__(self, *arguments, **named):
        pass

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other

    def __setstate__(self, state):
        pass

    def append(self, item):
        pass

    def extend(self, items):
        pass


class OddTensor:
    """Stands for a tensor of a file that is no plain array."""

    def __init__(self, kind):
        self.kind = kind

    def __setstate__(self, state):
        pass


class Rebuild:
    """A function of torch, of this name, by which a pickle makes a tensor out of a storage."""

    def __init__(self, name):
        self.name = name

    def __setstate__(self, state):
        pass

    def __call__(self, *arguments):
        if self.name in ('_rebuild_parameter', '_rebuild_parameter_with_state'):
            return arguments[0]
        if self.name == '_rebuild_from_type_v2':
            function, _, inner, _ = arguments
            return function(*inner) if isinstance(function, Rebuild) else OddTensor('no array')
        if self.name not in ('_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_tensor_v3'):
            kind = self.name.removeprefix('_rebuild_').replace('_', ' ')
            return OddTensor(f'of the kind "{printable(kind, 40)}"')
        storage, offset, size, stride, *rest = arguments
        if self.name == '_rebuild_tensor_v3':              # of a storage without a type
            storage = storage.view(rest[2])
        return storage.as_strided(size, stride, offset)


class TensorReader(pickle.Unpickler):
    """Reads the pickle of a file of torch.save, of which it knows tensors and plain containers. What
    else the file names becomes `Inert`: no class or function is imported for it, or called."""

    def __init__(self, path, archive):
        self.archive = archive
        self.whole = np.memmap(path, np.uint8, 'c')        # 'c': privately, the file is safe
        self.swap = is_big_endian(archive)
        self.storages = {}
        names = archive.namelist()
        pickled = min([name for name in names if name.endswith('/data.pkl')], key=len, default='')
        if not pickled:
            raise ValueError('a zip without data.pkl')
        self.folder = pickled.removesuffix('data.pkl')
        super().__init__(io.BytesIO(archive.read(pickled)), encoding='latin1')

    def find_class(self, module, name):
        if module in ('torch._utils', 'torch._tensor') and name.startswith('_rebuild_'):
            return Rebuild(name)
        if module in ('torch', 'torch.storage') and name in STORAGES:
            return STORAGES[name]
        if module == 'torch' and name in DTYPES:
            return DTYPES[name]
        return Inert

    def persistent_load(self, storage):
        """('storage', type, name of the entry, place, count of numbers) -> the numbers, mapped."""
        _, dtype, name, _, count = storage
        if not isinstance(dtype, torch.dtype):             # of quantised tensors
            return OddTensor('of a type that is not known here')
        if name not in self.storages:
            self.storages[name] = self.numbers(f'{self.folder}data/{name}', dtype, count)
        return self.storages[name].view(dtype)

    def numbers(self, name, dtype, count):
        entry = self.archive.getinfo(name)
        size = count * dtype.itemsize
        if entry.file_size < size:
            raise ValueError(f'{name} has {entry.file_size} bytes, expected {size}')
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        if self.swap or entry.compress_type != zipfile.ZIP_STORED:
            data = np.frombuffer(bytearray(self.archive.read(entry)), np.uint8)
            if self.swap:
                data = data.reshape(-1, dtype.itemsize)[:, ::-1].flatten()
        else:
            head = entry.header_offset
            lengths = self.whole[head + 26:head + 30].view('<u2')      # of the name, of the rest
            begin = head + 30 + int(lengths.sum())
            data = self.whole[begin:begin + entry.file_size]
        return torch.from_numpy(data[:size])


def read_torch(path):
    """What a file of torch.save holds. It is mapped into memory, so that an optimizer's state is
    never read; compressed numbers are read. Foreign classes become `Inert`. Raises ValueError."""
    if not zipfile.is_zipfile(path):
        return read_old(path)
    try:
        with zipfile.ZipFile(path) as archive:
            program = any(name.endswith('/constants.pkl') for name in archive.namelist())
            if not program:
                reader = TensorReader(path, archive)
                state = reader.load()
    except Exception as error:  # of pickle, zip and torch
        raise ValueError(f'{path}: truncated, or not a weight file ({first_line(error, 90)}); '
                         'nothing in it was executed. Download it again; if it is whole, save its '
                         'state dict alone') from None
    if program:
        raise ValueError(f'{path}: is a TorchScript program, and no program is run here; take '
                         "the same weights as a state dict, those of OpenAI's CLIP for MaskGen "
                         'from openai/clip-vit-large-patch14-336')
    mark_mapped(reader.storages, path)
    return state


def read_old(path):
    """What a file of torch.save from before 2020 holds, which is no zip: tensors and plain
    containers."""
    try:
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # torch raises many kinds here
        found = re.search(r'GLOBAL (\S+)', str(error))
        if found and is_pickle(path):
            raise ValueError(f'{path}: refused, an old file (before torch 1.6) that holds more than '
                             f'tensors, {printable(found[1])}; nothing in it was executed. Save its '
                             'state dict alone, where it was made') from None
        raise ValueError(f'{path}: truncated, or not a weight file ({first_line(error, 90)}); '
                         'nothing in it was executed. Download it again') from None


# Into a network, with the weights in memory once

def mark_mapped(tensors, path):
    """Mark the storages whose memory is, as the system says, this file mapped into it."""
    ranges = mapped_ranges(path)
    for value in tensors.values():
        storage = value.untyped_storage()
        begin = storage.data_ptr()
        end = begin + storage.nbytes()
        storage.mapped = any(first <= begin < end <= last for first, last in ranges)


def mapped_ranges(path):
    """[(first address, end)] of what is mapped from a file; [] where the system is not Linux."""
    try:
        with open('/proc/self/maps', encoding='utf-8', errors='replace') as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    ranges = []
    for line in lines:
        fields = line.split(maxsplit=5)                   # addresses, rights, ..., path
        if len(fields) == 6 and fields[5] == os.path.realpath(path):
            first, last = fields[0].split('-')
            ranges.append((int(first, 16), int(last, 16)))
    return ranges


def drop_pages(tensor):
    """Take a mapped tensor out of memory, where it would lie beside its copy; the system reads it
    anew if it is used once more. Others are left alone: they would lose their values."""
    mapped = getattr(tensor.untyped_storage(), 'mapped', False)
    if not mapped or not tensor.is_contiguous() or not tensor.numel():
        return
    begin = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    length = tensor.data_ptr() + tensor.nbytes - begin
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def shape_of(weights, name, what, key, *wanted):
    """The shape of a published tensor, where 0 in `wanted` is any size. Raises ValueError: which
    file, which key."""
    form = '(' + ', '.join(str(size) if size else '*' for size in wanted) + ')'
    place = f'{name}: {key}, expected {form} in {what},'
    if key not in weights:
        some = ', '.join(list(weights)[:3])
        raise ValueError(f'{place} is missing; the file begins with {some} ({len(weights)} in all). '
                         'Is this the right file, and whole?')
    found = tuple(weights[key].shape)
    fits = len(found) == len(wanted) and all(f == (w or f) and f for f, w in zip(found, wanted))
    if not fits:
        raise ValueError(f'{place} has shape {found}. Is this the right file, and whole?')
    return found


def fill(network, weights, rename, name):
    """Put published weights of any precision into a network built on the meta device, as float32;
    `rename` translates its keys. All that it needs must be there; what else the file holds is said.
    Each is copied, and then looked at. Raises ValueError naming the first key that does not fit."""
    wanted = {key: rename(key) for key in network.state_dict()}
    what = type(network).__name__
    for key, value in network.state_dict().items():
        shape_of(weights, name, what, wanted[key], *value.shape)
    tell_unused(sorted(weights.keys() - wanted.values()), set(wanted.values()), name)
    copies, holes = {}, []
    for key, own in network.state_dict().items():
        theirs, place = weights[wanted[key]], f'{name}: {wanted[key]}'
        check_kind(theirs, own, place)
        copies[key] = copied(theirs)
        check_weight(copies[key], place)
        if has_hole(copies[key]) and not key.startswith('null_'):      # which no file holds
            holes.append(wanted[key])
    if holes and is_rank0():
        print(f'note: {name}: {len(holes)} tensors have {HOLE} zeros in a row, the first is '
              f'{holes[0]}; is the file whole?')
    network.load_state_dict(copies, assign=True)
    return network.eval()


PIECE = 2 ** 20    # numbers


def copied(theirs):
    """A copy in float32, piece by piece, where each is taken out of memory before the next comes
    in: memory so holds the weights once."""
    theirs = theirs.detach()
    if theirs.dim() == 0:
        return theirs.to(torch.float32, copy=True)
    copy = torch.empty(theirs.shape, dtype=torch.float32, device=theirs.device)
    rows = max(1, PIECE * len(theirs) // max(1, theirs.numel()))
    for ours, piece in zip(copy.split(rows), theirs.split(rows)):
        ours.copy_(piece)
        drop_pages(piece)
    return copy


HOLE = 4096        # zeros, 16 kB in float32: what was never written of a file reads as zeros


def has_hole(value):
    if value.is_meta:
        return False
    flat = value.reshape(-1)
    blocks = flat[:len(flat) // HOLE * HOLE].view(-1, HOLE)
    return not bool(blocks.any(1).all())


def tell_unused(extra, wanted, name):
    """Say what a file holds and its network does not need (buffers of its training, a loss). A layer
    inside a part that the network has would change what it computes: ValueError."""
    roots = {key.split('.')[0] for key in wanted if '.' in key}
    owners = {key.rpartition('.')[0] for key in wanted} - {''}
    for key in extra:
        inside = key.split('.')[0] in roots and key.endswith(('weight', 'bias'))
        if inside or key.rpartition('.')[0] in owners:
            raise ValueError(f'{name}: {key} is a layer, or a part of one, that this network has no '
                             'place for: it would compute something else. Is this the right file?')
    if extra and is_rank0():
        print(f'note: {name}: {len(extra)} tensors are not needed and left out, the first is '
              f'{extra[0]}')


def needed(network, weights, name):
    """Those of the weights that a network has, for `restore`; what else there is, is said."""
    wanted = network.state_dict().keys()
    tell_unused(sorted(weights.keys() - wanted), set(wanted), name)
    return {key: weights[key] for key in wanted if key in weights}


def found_numbers(weights, pattern):
    """The numbers, as text, that one group of `pattern` takes in the names."""
    found = set()
    for key in weights:
        match = re.match(pattern, key)
        if match:
            found.add(match[1])
    return found


def count_numbers(weights, pattern):
    return len(found_numbers(weights, pattern))


def seeded(cls, config):
    """A network of random weights, always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(**config).eval()
