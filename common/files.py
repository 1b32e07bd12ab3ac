"""Our checkpoints, written and read safely, and what they were made from: nothing in a file is ever executed."""
import contextlib
import glob
import hashlib
import json
import math
import os
import re
import shutil
import zipfile
from collections import OrderedDict

import torch

from common.run import is_rank0, replacing, say, try_writing, writing


# -----------------------------------------------------------------------------
# Checkpoints: one dict of tensors and plain containers in a file

def previous(path):
    """Where the checkpoint before the newest one is kept: out/x.pt -> out/x.prev.pt."""
    return '.prev'.join(os.path.splitext(path))


def exists(path):
    return os.path.exists(path) or os.path.exists(previous(path))


def set_aside(path):
    """A run that starts anew leaves no checkpoint of another where --resume would find it: that one
    becomes *.old.pt, with a note."""
    older = '.old'.join(os.path.splitext(path))
    if os.path.exists(path) and os.path.exists(previous(path)):
        os.remove(previous(path))
    for there in (path, previous(path)):
        if os.path.exists(there):
            os.replace(there, older)
            print(f'note: {there} of an earlier run is now {older}')


def save_checkpoint(path, state):
    """Write a dict of tensors and plain containers: temporary name, flush to disk, rename; the file
    that was there is kept as *.prev.pt, unless broken. Rank 0 only. Raises ValueError where weights
    are not finite, OSError where the folder or the disk cannot take it."""
    if not all_finite(state.get('net', {})) or not all_finite(state.get('ema', {})):
        raise ValueError(f'{path}: not written, the weights are not finite at step {state["step"]}; lower the learning '
                         'rates. The last checkpoint is good: --resume continues from it.')
    try:
        with replacing(path) as temporary:
            with open(temporary, 'wb') as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            if zipfile.is_zipfile(path):                       # whole
                keep_previous(path)
    finally:
        for leftover in glob.glob(f'{glob.escape(path)}.*.tmp'):    # of a killed run, too
            os.remove(leftover)


def keep_previous(path):
    """Copy, not rename, so that `path` never lacks."""
    with replacing(previous(path)) as older:
        shutil.copyfile(path, older)


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
    return Entries(state, path)


class Entries(OrderedDict):
    """What a checkpoint holds, or a dict in it, where an entry that is asked for and missing is a
    ValueError that names the file. torch.save writes it as an OrderedDict, which is read again."""

    def __init__(self, entries, place):
        super().__init__(entries)
        self.place = place
        for key in INNER:
            if isinstance(self.get(key), dict):
                self[key] = Entries(self[key], f'{place}: {key}')

    def __missing__(self, key):
        raise ValueError(f'{self.place}: has no entry {key!r}, which this project writes; was it '
                         'edited, or made by an older version? Make it anew')

    def __reduce__(self):
        return OrderedDict, (), None, None, iter(self.items())


INNER = ('config', 'args', 'tokenizer', 'prompts')     # dicts in a checkpoint whose entries we know


def build(cls, args, path):
    """A network from the settings in a checkpoint. Raises ValueError where these make none."""
    try:
        return cls(**args)
    except (TypeError, RuntimeError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(f'{path}: its "args" make no {cls.__name__} ({first_line(error, 120)}); '
                         'was it edited? Make it anew') from None


def read_checkpoint(path, mapped=False):
    """-> what the file holds, and what is wrong with it or ''. Mapped: tensors are read when used."""
    try:
        mapped = mapped and can_be_mapped(path)
        return torch.load(path, map_location='cpu', weights_only=True, mmap=mapped), ''
    except FileNotFoundError:
        return None, 'no such checkpoint'
    except Exception as error:  # torch raises many kinds here
        if type(error).__name__ == 'UnpicklingError' and is_pickle(path):
            return None, 'refused, it holds more than tensors and plain containers (nothing in it was executed)'
        return None, f'truncated or not a checkpoint ({first_line(error, 80)})'


def can_be_mapped(path):
    """Do the tensors stand in a file of torch.save as they do in memory? Compressed ones, and those
    of another byte order, must be read instead."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        return stored and not is_big_endian(archive)


def is_big_endian(archive):
    """The order of the bytes in a file of torch.save is an entry of its own; old ones have none."""
    for name in archive.namelist():
        if name.endswith('/byteorder'):
            return archive.read(name) == b'big'
    return False


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
        return f'is a {printable(found, 40)} checkpoint, expected {stage.replace("|", " or ")}'
    for key in ('config', 'args', 'tokenizer'):
        if not isinstance(state.get(key, {}), dict):
            return f'its entry {key!r} is no dict; was it edited? Make it anew'
    return ''


def printable(text, most=100):
    """Any text of a file as part of a message: one line, short, nothing that steers a terminal."""
    text = re.sub(r'\x1b\[[\d;]*[A-Za-z]', '', str(text)[:10 * most])      # colours
    shown = ''.join(letter if letter.isprintable() else '?' for letter in text)
    if len(shown) > most:
        return shown[:most - 3] + '...'
    return shown


def first_line(error, most):
    lines = str(error).splitlines() or ['empty']
    return printable(lines[0], most)


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
            reason = f'it has no {printable(error)}'
        raise ValueError(f'cannot load {what} from {place}: {reason}; {expected}') from None


def settings_of(path, keys):
    """What a checkpoint says of the settings `keys` -> {setting: value}; {} where there is no
    readable one (loading it will say so)."""
    state, problem = read_checkpoint(path, mapped=True)
    if problem:
        state, problem = read_checkpoint(previous(path), mapped=True)
    config = None
    if not problem and isinstance(state, dict):
        config = state.get('config')
    if not isinstance(config, dict):
        return {}
    made = {key: value for key, value in config.items() if key in keys}
    if not os.path.exists(made.get('teacher_ckpt', '')):       # gone; model.pt beside the checkpoint may do
        made.pop('teacher_ckpt', None)
    return made


def claim(path, may_be_there):
    """Before slow work: ValueError where a run would replace the checkpoint of another, which only
    --resume and --overwrite may; OSError where none can be written."""
    if exists(path) and not may_be_there:
        raise ValueError(f'{path} is there already and would be replaced; continue it with --resume, keep it with '
                         'another --out_dir, or replace it with --overwrite')
    if is_rank0():
        try_writing(path)


def resumes(resume, path):
    """Is there something that --resume continues? Without it the run starts, with a note."""
    if resume and not exists(path):
        say(f'note: {path} is not there yet, so there is nothing to resume; starting at step 0')
    return resume and exists(path)


def note_unfinished(state, path):
    """Say where a run builds on one that has not reached its last step. Rewards may end it early."""
    steps = state['config'].get('steps', 0)
    if state['step'] < steps and state['stage'] != 'reward':
        say(f'note: {path} is unfinished, at step {state["step"]} of {steps}; --resume of its script continues it')


def load_resumed(path, stage, config):
    """The checkpoint that --resume continues, with a note of the settings in `config` that are not
    that run's."""
    state = load_checkpoint(path, stage, 'Start without --resume.', fallback=True)
    other = []
    for key, value in config.items():
        before = state['config'].get(key, value)
        if before != value and key not in ('resume', 'overwrite', 'bench', 'out_dir'):
            other.append(f'--{key}={value} (it had {printable(before)})')
    if other:
        say(f'note: {path} continues with {", ".join(other)}')
    return state


def restore(module, weights, path, name):
    """Strict loading; ValueError says which file and which keys."""
    if not isinstance(weights, dict):
        raise ValueError(f'{path}: {name} is no dict of tensors by name; was it edited? Make it '
                         'anew')
    for key, own in module.state_dict().items():
        if key in weights:
            place = f'{path}: {name}: {key}'
            check_kind(weights[key], own, place)
            check_weight(weights[key], place)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        lines = [printable(line.strip(), 300) for line in str(error).splitlines()[1:4]]
        raise ValueError(f'{path}: {name} does not fit this network: {" ".join(lines)} Was it made with other sizes? '
                         'Use the same settings, or another folder.') from None


def check_kind(value, own, place):
    """Raise ValueError unless a tensor of a file can be the weight `own`: a plain one, and of
    numbers with a fraction where that has them."""
    odd = odd_kind(value)
    if not odd and own.is_floating_point() and not value.is_floating_point():
        odd = f'of the type {str(value.dtype).removeprefix("torch.")}'
    if odd:
        raise ValueError(f'{place} is {odd}, expected a plain tensor of float32, float16 or '
                         'bfloat16; take the weights in one of these')


def check_weight(value, place):
    """Raise ValueError where a weight holds NaN or infinite numbers."""
    if not is_finite(value):
        raise ValueError(f'{place} holds NaN or infinite numbers, expected finite ones. Take '
                         'another copy or an earlier checkpoint')


def check_weights(network, name):
    """`check_weight` of all weights of a network that was read elsewhere."""
    for key, value in network.state_dict().items():
        check_weight(value, f'{name}: {key}')


def is_finite(value):
    """Without a copy of it: NaN spreads to the smallest and the largest number."""
    if value.is_meta or not value.numel() or not value.is_floating_point():
        return True
    low, high = value.detach().aminmax()
    return bool(low.isfinite() and high.isfinite())


def odd_kind(value):
    """What keeps a tensor from being a plain array, in words, or ''."""
    if not isinstance(value, torch.Tensor):
        return 'no tensor'
    if value.is_quantized:
        return 'a quantised tensor'
    if value.is_nested:
        return 'a nested tensor'
    if value.layout != torch.strided:
        return 'a sparse tensor'
    return ''


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
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path}: its optimizers do not fit ({first_line(error, 100)}); resume with '
                         'the settings of Muon and of frozen tables that it was made with') from None


# -----------------------------------------------------------------------------
# Log lines

class Log:
    """log.jsonl beside the checkpoint: one JSON object per log line, numbers that follow from the
    seed only (times go to the console), so that a resumed run writes the same lines as an
    uninterrupted one. At step 0 a run starts anew, without what an earlier one left behind."""

    def __init__(self, checkpoint, step):
        if step == 0:
            set_aside(checkpoint)
        self.path = os.path.splitext(checkpoint)[0] + '.log.jsonl'
        with replacing(self.path) as new:
            kept = self.lines_until(step)                      # drop what a crash left behind
            with open(new, 'w', encoding='utf-8') as file:
                file.writelines(kept)

    def lines_until(self, step):
        if not step or not os.path.exists(self.path):
            return []
        with open(self.path, encoding='utf-8', errors='replace') as file:
            return [line for line in file if logged_step(line) <= step]

    def write(self, row):
        with writing(self.path), open(self.path, 'a', encoding='utf-8') as file:
            file.write(json.dumps(row) + '\n')


def logged_step(line):
    """The step of a log line, infinity where a crash has left something else."""
    try:
        step = json.loads(line)['step'] if line.endswith('\n') else None
    except (ValueError, TypeError, KeyError, RecursionError):
        step = None
    return step if isinstance(step, int) else math.inf


# -----------------------------------------------------------------------------
# What a checkpoint was made from: its `origin`, {part: digest}

MEANING = {'tokenizer': 'tokens', 'vocabulary': 'word numbers'}       # with another they mean something else
CHOICES = {'data': 'other images', 'teacher': 'another teacher', 'start': 'another generator as its start'}


def digest_of(value):
    """A digest of strings and numbers in plain containers."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def file_digest(path):
    sha = hashlib.sha256()
    size = os.path.getsize(path)
    with open(path, 'rb') as file:
        for _ in range(0, size, 1 << 20):
            sha.update(file.read(1 << 20))
    return sha.hexdigest()


def check_origin(path, state, now):
    """Compare what the checkpoint `state` at `path` was made from with what is there `now`, {part:
    digest}: tokenizer, vocabulary, data, teacher, start. With another tokenizer or vocabulary its
    numbers mean something else: ValueError. Anything else that is another is a choice: a note."""
    before = state.get('origin', {})
    other = [part for part in before if before[part] != now.get(part, before[part])]
    for part in other:
        if part in MEANING:
            raise ValueError(f'{path}: was made with a {part} other than the present one, so its {MEANING[part]} mean '
                             'something else; give what it was made with, or make it anew in another folder')
        say(f'note: {path} was made with {CHOICES[part]}')
