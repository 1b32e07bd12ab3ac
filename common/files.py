"""Our checkpoints, written safely; published files, read safely: nothing in a file is ever executed."""
import contextlib
import ctypes
import glob
import json
import math
import mmap
import os
import re
import shutil
import zipfile
from collections import OrderedDict

import numpy as np
import torch

from common.run import is_rank0, writing

WEIGHT_FILES = ('.safetensors', '.pth', '.pt', '.bin', '.ckpt')
INDEX_FILE = re.compile(r'\.(safetensors|bin)\.index(\.(fp16|bf16))?\.json$')
SHARD = re.compile(r'-\d+-of-\d+\.')                   # model-00001-of-00003.safetensors
HALF = re.compile(r'[._-](fp16|bf16)[._-]')             # model.fp16.safetensors
USUAL_NAMES = ('model.', 'pytorch_model.', 'diffusion_pytorch_model.')


# -----------------------------------------------------------------------------
# Checkpoints: one dict of tensors and plain containers in a file

def previous(path):
    """Where the checkpoint before the newest one is kept: out/x.pt -> out/x.prev.pt."""
    return '.prev'.join(os.path.splitext(path))


def exists(path):
    return os.path.exists(path) or os.path.exists(previous(path))


def save_checkpoint(path, state):
    """Write a dict of tensors and plain containers: temporary name, flush to disk, rename; the file
    that was there is kept as *.prev.pt, unless broken. Rank 0 only. Raises ValueError where weights
    are not finite, OSError where the folder or the disk cannot take it."""
    temporary = f'{path}.{os.getpid()}.tmp'
    if not all_finite(state.get('net', {})) or not all_finite(state.get('ema', {})):
        raise ValueError(f'{path}: not written, the weights are not finite at step {state["step"]}; lower the learning '
                         'rates. The last checkpoint is good: --resume continues from it.')
    try:
        with writing(path):
            with open(temporary, 'wb') as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            if zipfile.is_zipfile(path):                       # whole
                keep_previous(path)
            os.replace(temporary, path)
    finally:
        for leftover in glob.glob(f'{glob.escape(path)}.*.tmp'):    # of a killed run, too
            os.remove(leftover)


def keep_previous(path):
    """Copy, not rename, so that `path` never lacks."""
    older = f'{path}.{os.getpid()}.prev.tmp'
    shutil.copyfile(path, older)
    os.replace(older, previous(path))


def all_finite(weights):
    return all(value.isfinite().all() for value in weights.values())


def load_checkpoint(path, stage='', hint='', fallback=False):
    """Read a checkpoint of ours onto the CPU without executing code; `stage` is what it must be
    (words separated by '|'). With `fallback` an unreadable newest file is reported and the previous
    one used. Raises ValueError."""
    state, problem = read_checkpoint(path)
    if problem and fallback and os.path.exists(previous(path)):
        print(f'{path}: {problem}; using the previous one, {previous(path)}')
        return load_checkpoint(previous(path), stage, hint)
    if not problem:
        problem = not_the_stage(state, stage)
    if problem:
        raise ValueError(f'{path}: {problem}. {hint}'.strip())
    return state


def read_checkpoint(path, mapped=False):
    """-> what the file holds, and what is wrong with it or ''. Mapped: tensors are read when used."""
    try:
        mapped = mapped and zipfile.is_zipfile(path)
        return torch.load(path, map_location='cpu', weights_only=True, mmap=mapped), ''
    except FileNotFoundError:
        return None, 'no such checkpoint'
    except Exception as error:  # torch raises many kinds here
        if type(error).__name__ == 'UnpicklingError' and is_pickle(path):
            return None, 'refused, it holds more than tensors and plain containers (nothing in it was executed)'
        return None, f'truncated or not a checkpoint ({first_line(error, 80)})'


def is_pickle(path):
    """Is it what torch.save writes, today's zip or yesterday's pickle?"""
    with open(path, 'rb') as file:
        return zipfile.is_zipfile(path) or file.read(1) == b'\x80'


def not_the_stage(state, stage):
    """What is wrong with a whole file that should be one of the stages 'a|b', or ''."""
    found = state.get('stage') if isinstance(state, dict) else None
    if not isinstance(found, str):
        return 'not a checkpoint of this project (no "stage" entry)'
    if stage and found not in stage.split('|'):
        return f'is a {found} checkpoint, expected {stage.replace("|", " or ")}'
    return ''


def first_line(error, most):
    text = str(error) or 'empty'
    return text.splitlines()[0][:most]


@contextlib.contextmanager
def open_hub(place, purpose, what, expected):
    """`with open_hub(...) as transformers:` surrounds the reading of `what` from a place. A missing
    package, and any error inside, such as a missing or wrong file, become a ValueError of one line
    that says what was expected."""
    try:
        import transformers
    except ImportError:
        raise ValueError(f'{purpose} need one more package: pip install transformers') from None
    try:
        yield transformers
    except Exception as error:         # transformers raises many kinds here
        reason = first_line(error, 200)
        if isinstance(error, KeyError):
            reason = f'it has no {error}'
        raise ValueError(f'cannot load {what} from {place}: {reason}; {expected}') from None


def settings_of(path, keys):
    """What a checkpoint says of the settings `keys` -> {setting: value}; {} where there is no
    readable one (loading it will say so)."""
    state, problem = read_checkpoint(path, mapped=True)
    if problem:
        state, problem = read_checkpoint(previous(path), mapped=True)
    if problem or not isinstance(state, dict):
        return {}
    made = {key: value for key, value in state.get('config', {}).items() if key in keys}
    if not os.path.exists(made.get('teacher_ckpt', '')):       # gone; model.pt beside the checkpoint may do
        made.pop('teacher_ckpt', None)
    return made


def resumes(resume, path):
    """Is there something that --resume continues? Without it the run starts, with a note."""
    if resume and not exists(path) and is_rank0():
        print(f'note: {path} is not there yet, so there is nothing to resume; starting at step 0')
    return resume and exists(path)


def load_resumed(path, stage, config):
    """The checkpoint that --resume continues, with a note of the settings in `config` that are not
    that run's."""
    state = load_checkpoint(path, stage, 'Start without --resume.', fallback=True)
    other = []
    for key, value in config.items():
        before = state['config'].get(key, value)
        if before != value and key not in ('resume', 'bench', 'out_dir'):
            other.append(f'--{key}={value} (it had {before})')
    if other and is_rank0():
        print(f'note: {path} continues with {", ".join(other)}')
    return state


def restore(module, weights, path, name):
    """Strict loading; ValueError says which file and which keys."""
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:4]]
        raise ValueError(f'{path}: {name} does not fit this network: {" ".join(lines)} Was it made with other sizes? '
                         'Use the same settings, or another folder.') from None


def optimizer_states(optimizers):
    """The states of {network: [optimizers]} as one list, in that order."""
    return [optimizer.state_dict() for some in optimizers.values() for optimizer in some]


def restore_optimizers(optimizers, states, path):
    """The reverse. ValueError says what to do where a run is resumed with other kinds of
    optimizers; on another device too."""
    flat = [optimizer for some in optimizers.values() for optimizer in some]
    try:
        for optimizer, state in zip(flat, states, strict=True):
            for group in state['param_groups']:
                if 'fused' in group:
                    group['fused'] = optimizer.defaults['fused']
            optimizer.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f'{path}: its optimizers do not fit ({error}); resume with the settings of Muon and of frozen '
                         'tables that it was made with') from None


# -----------------------------------------------------------------------------
# Published files

class Inert:
    """Stands for every class or function that a published file refers to: nothing is executed.
    Without arguments it is a dict, which the file may fill (Lightning's settings), else an empty
    object."""

    def __new__(cls, *arguments):
        return object.__new__(cls) if arguments else OrderedDict()

    def __setstate__(self, state):
        pass


def read_published(source, part=''):
    """A published file, its folder, or the dict that it holds -> (flat dict of tensors, its name in
    errors). Read are safetensors, files of torch.save and indexes of shards; nested dicts (MaskGIT,
    Lightning) are opened. Tensors of a file are mapped, not read: `fill` copies them, and nobody
    may write to them. `part` is the sub-folder meant where a folder holds several networks: an
    error names it. Raises FileNotFoundError, ValueError."""
    if isinstance(source, dict):
        name, tensors = 'the given dict', flat_tensors(source)
    else:
        name = weight_file(os.fspath(source), part)
        tensors = read_weights(name)
    if not tensors:
        raise ValueError(f'{name}: holds no tensors by name, expected a state dict')
    return tensors, name


def flat_tensors(state):
    """The tensors by name of what a file holds, {} where there are none."""
    for nest in ('model_state_dict', 'state_dict'):
        if not isinstance(state, dict):
            break
        state = state.get(nest, state)
    tensors = {}
    if isinstance(state, dict):
        for key, value in state.items():
            if isinstance(key, str) and is_plain_tensor(value):
                tensors[key] = value
    return tensors


def is_plain_tensor(value):
    return isinstance(value, torch.Tensor) and value.layout == torch.strided      # not sparse


# Which file

def weight_file(path, part=''):
    """A file, or the one of a folder that holds all weights, or the index of their shards. Raises
    FileNotFoundError, ValueError."""
    if os.path.isdir(path):
        path = os.path.join(path, choose_file(path, part))
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path}: no such file; expected published weights (see README.md)')
    return path


def choose_file(folder, part):
    """Full precision before fp16 and bf16, safetensors before .bin, a usual name before others, one
    file before an index of shards. Raises ValueError unless one is left."""
    left = weight_names(folder)
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


def is_full(name):
    return not HALF.search(name)


def is_safetensors(name):
    return '.safetensors' in name


def is_usual(name):
    return name.startswith(USUAL_NAMES)


def is_whole(name):
    return not name.endswith('.json')


def no_weights(folder, part):
    """What is wrong with a folder that has no weights: it holds shards without their index, or its
    sub-folders hold the weights, as in the layout of diffusers."""
    shards = [name for name in sorted(os.listdir(folder)) if SHARD.search(name)]
    if shards:
        return (f'{folder}: holds shards of weights such as {shards[0]}, but not the index that '
                'lists them (its name ends in .index.json); download it, too')
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
    """The tensors by name of a weight file, or of all files of an index. Raises ValueError,
    FileNotFoundError."""
    with open(path, 'rb') as file:
        if file.read(23) == b'version https://git-lfs':
            raise ValueError(f'{path}: is a pointer of Git LFS and not the weights; fetch them '
                             'with: git lfs pull')
    if path.endswith('.json'):
        return read_shards(path)
    if path.endswith('.safetensors'):
        tensors = read_safetensors(path)
    else:
        tensors = read_torch(path)
    mark_mapped(tensors, path)
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
            raise ValueError(f'{path}: names the file {shard!r}, {form}')
        shard_path = os.path.join(os.path.dirname(path), shard)
        if not os.path.isfile(shard_path):
            raise FileNotFoundError(f'{path}: lists {shard}, which is missing in this folder '
                                    f'({len(shards)} files in all); download it, too')
        tensors.update(read_weights(shard_path))
    for key, shard in places.items():
        if key not in tensors:
            raise ValueError(f'{path}: {key} should be in {shard} and is not; are all files of '
                             'one release?')
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
            raise ValueError(f'{path}: {name} should be bytes {begin} to {end}, expected a begin at '
                             f'{position} and an end within {len(data)}; the file is cut off or its '
                             'header wrong. Download it again')
        if begin == end:
            tensors[name] = torch.empty(shape, dtype=dtype)
        else:
            tensors[name] = torch.from_numpy(data[begin:end]).view(dtype).view(shape)
        position = end
    if position != len(data):
        raise ValueError(f'{path}: the last {len(data) - position} bytes are no tensor of its '
                         'header. Download it again')
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
    place = f'{path}: its header says {str(entry)[:100]} of {name}'
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


def read_torch(path):
    """The tensors by name of a file of torch.save. It is mapped into memory, so that an optimizer's
    state is never read. Foreign classes become `Inert`. Raises ValueError."""
    try:
        packed = zipfile.is_zipfile(path)
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if packed else []
        inert = [(Inert, name) for name in foreign]
        with torch.serialization.safe_globals(inert):
            state = torch.load(path, map_location='cpu', weights_only=True, mmap=packed)
    except Exception as error:  # torch raises many kinds here
        if 'torchscript' in str(error).lower():
            raise ValueError(f'{path}: is a TorchScript program, and no program is run here; take '
                             "the same weights as a state dict, those of OpenAI's CLIP for MaskGen "
                             'from openai/clip-vit-large-patch14-336') from None
        raise ValueError(f'{path}: truncated, not a weight file, or refused as unsafe '
                         f'({first_line(error, 90)}); nothing in it was executed. Download it again; '
                         'if it is whole, save its state dict alone') from None
    return flat_tensors(state)


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
        raise ValueError(f'{place} is missing; the file begins with {next(iter(weights))}. Is this the right file, '
                         'and whole?')
    found = tuple(weights[key].shape)
    fits = len(found) == len(wanted) and all(f == (w or f) and f for f, w in zip(found, wanted))
    if not fits:
        raise ValueError(f'{place} has shape {found}. Is this the right file, and whole?')
    return found


def fill(network, weights, rename, name):
    """Put published weights of any precision strictly into a network built on the meta device, as
    float32; `rename` translates its keys. Each is copied and then taken out of memory, which so
    holds them once. Raises ValueError naming the first key that does not fit."""
    wanted = {key: rename(key) for key in network.state_dict()}
    for key, value in network.state_dict().items():
        shape_of(weights, name, type(network).__name__, wanted[key], *value.shape)
    extra = sorted(weights.keys() - wanted.values())
    if extra:
        raise ValueError(f'{name}: {len(extra)} keys that this network has no place for, the first is {extra[0]}. '
                         'Is this the right file?')
    copies = {}
    for key, theirs in wanted.items():
        copies[key] = weights[theirs].to(torch.float32, copy=True)
        drop_pages(weights[theirs])
    network.load_state_dict(copies, assign=True)
    return network.eval()


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
