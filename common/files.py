"""Our checkpoints, written safely; published files, read safely: nothing in a file is ever executed."""
import glob
import os
import shutil
import zipfile
from collections import OrderedDict

import torch

from common.run import is_rank0, writing

WEIGHT_FILES = ('.pth', '.pt', '.bin', '.ckpt')


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
                         'Use the same settings, or another --out_dir.') from None


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


def read_published(source):
    """A published file, its folder, or the dict that it holds -> (flat dict of tensors, its name in
    errors). Nested dicts (MaskGIT, Lightning) are opened. Raises FileNotFoundError, ValueError."""
    if isinstance(source, dict):
        name, state = 'the given dict', source
    else:
        name = weight_file(os.fspath(source))
        state = read_weights(name)
    for nest in ('model_state_dict', 'state_dict'):
        if not isinstance(state, dict):
            break
        state = state.get(nest, state)
    tensors = {}
    if isinstance(state, dict):
        for key, value in state.items():
            if isinstance(key, str) and isinstance(value, torch.Tensor):
                tensors[key] = value
    if not tensors:
        raise ValueError(f'{name}: holds no tensors by name, expected a state dict')
    return tensors, name


def weight_file(path):
    """A file, or the one weight file of a folder. Raises FileNotFoundError, ValueError."""
    if os.path.isdir(path):
        files = sorted(name for name in os.listdir(path) if name.endswith(WEIGHT_FILES))
        if len(files) != 1:
            raise ValueError(f'{path}: holds {len(files)} weight files {files}, expected one; name the file')
        path = os.path.join(path, files[0])
    if not os.path.isfile(path):
        raise FileNotFoundError(f'{path}: no such file; expected published weights (see README.md)')
    return path


def read_weights(path):
    """What a file of torch.save holds. It is mapped into memory, so that an optimizer's state is
    never read: `fill` copies what is kept. Foreign classes become `Inert`. Raises ValueError."""
    try:
        packed = zipfile.is_zipfile(path)
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path) if packed else []
        inert = [(Inert, name) for name in foreign]
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location='cpu', weights_only=True, mmap=packed)
    except Exception as error:  # torch raises many kinds here
        raise ValueError(f'{path}: truncated, not a weight file, or refused as unsafe ({first_line(error, 90)}); '
                         'nothing in it was executed. Download it again; if it is whole, save its state dict alone'
                         ) from None


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
    """Put published weights strictly into a network built on the meta device, whose keys `rename`
    translates. Raises ValueError naming the first key that does not fit."""
    wanted = {key: rename(key) for key in network.state_dict()}
    for key, value in network.state_dict().items():
        shape_of(weights, name, type(network).__name__, wanted[key], *value.shape)
    extra = sorted(weights.keys() - wanted.values())
    if extra:
        raise ValueError(f'{name}: {len(extra)} keys that this network has no place for, the first is {extra[0]}. '
                         'Is this the right file?')
    copies = {key: weights[theirs].to(torch.float32, copy=True) for key, theirs in wanted.items()}
    network.load_state_dict(copies, assign=True)
    return network.eval()
