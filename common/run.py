"""
What every script needs and the paper does not: settings from the command line, processes, seeds, gradient averaging,
optimizers, log, progress, benchmark. Imports nothing of ours.
"""
import ast
import contextlib
import difflib
import dis
import functools
import hashlib
import io
import math
import os
import re
import signal
import sys
import tempfile
import time
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

RULE = '# ' + '-' * 77                                 # stands before and after the settings of a script
DRAWN = ('shapes', 'shapes-open')                      # values of --data that are no folders
HERE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


# -----------------------------------------------------------------------------
# Settings: defaults in the script < the checkpoint it starts from < the teacher's recipe < the command line

OWN_SETTINGS = set()                                   # of the script that runs: `configure` fills it


def configure(g, recipes=None, handed_on=None, argv=None):
    """Set the lower-case scalar globals of a script `g` and return them as a dict, which is printed
    and saved. `recipes` {teacher: {setting: value}} is what --teacher=NAME changes;
    handed_on(settings) -> {setting: value} is what a checkpoint says. The command line takes
    --key=value, --key value, a bare --key for a bool; dashes equal underscores; --help prints the
    block. Exits with one line on an unknown key, a wrong type, a value that cannot be, a setting
    without effect. GIVEN are the settings that the command line names, CHANGED those of them that
    it changes."""
    sys.excepthook = report_error
    if argv is None:
        sys.stdout = console(sys.stdout)
        sys.stderr = console(sys.stderr)
        argv = sys.argv[1:]
    script = script_name(g)
    keys = setting_names(g)
    OWN_SETTINGS.clear()
    OWN_SETTINGS.update(keys)
    given = read_arguments(argv, g, keys)
    defaults = {key: g[key] for key in keys}
    handed = handed_on({**defaults, **given}) if handed_on else {}
    kind = {**defaults, **handed, **given}.get('teacher')
    recipe = (recipes or {}).get(kind, {})
    for key, value in recipe.items():
        if key not in keys or type(value) is not type(g[key]):
            raise TypeError(f'{script}: {key}={value!r} in a recipe is no setting of this script and type')
    for key, value in handed.items():
        if type(value) is not type(g[key]):
            raise ValueError(f'{script}: a checkpoint hands on {key}={value!r}, expected a {type(g[key]).__name__}; was '
                             'it edited?')
    usual = {**defaults, **handed, **recipe}
    settings = {**usual, **given}
    changed = [key for key in given if given[key] != usual[key]]
    rank, _, _ = launched()
    if recipe and rank == 0:
        applied = {key: value for key, value in recipe.items() if key not in given}
        listed = ' '.join(f'--{key}={value}' for key, value in applied.items())
        print(f'recipe of --teacher={settings["teacher"]}: {listed}')
    for key in settings:
        settings[key] = absolute(key, settings[key])
    check_limits(script, settings, g.get('LIMITS', {}), defaults)
    if 'USES' in g:
        check_used(script, settings, given, g['USES'], g['in_use'], defaults)
    g.update(settings, GIVEN=tuple(given), CHANGED=tuple(changed))
    return settings


def absolute(key, value):
    """Paths that a checkpoint hands on are good from anywhere: a folder of data, and what is there
    of the other files; a hub id or the word random stays as it is."""
    if key == 'data' and value and value not in DRAWN:
        return os.path.abspath(value)
    if (key.endswith('_path') or key in ('teacher_ckpt', 'init', 'prompts')) and os.path.exists(value):
        return os.path.abspath(value)
    return value


def script_name(g):
    return os.path.basename(g.get('__file__', 'script'))


def setting_names(g):
    """Settings are the lower-case globals of four plain types, and D; constants are in capitals."""
    names = []
    for key, value in g.items():
        is_setting = key == key.lower() or len(key) == 1
        if type(value) in (bool, int, float, str) and is_setting and not key.startswith('_'):
            names.append(key)
    return names


def read_arguments(words, g, keys):
    """Words of the command line -> {setting: value}. Exits with one line."""
    script, given = script_name(g), {}
    words = list(words)
    while words:
        word = words.pop(0)
        if word in ('--help', '-h'):
            print_help(g)
            raise SystemExit(0)
        if not word.startswith('--') or len(word) < 3:
            raise SystemExit(f'{script}: stray word {word!r}; settings look like --name=value')
        key, equals, text = word[2:].partition('=')
        key = key.replace('-', '_')
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
            advice = f'did you mean --{near[0]}?' if near else 'see --help for the list'
            raise SystemExit(f'{script}: unknown setting --{key}; {advice}')
        kind = type(g[key])
        if not equals:
            text = next_value(words, kind)
        if text is None:
            raise SystemExit(f'{script}: --{key} needs a value, as in --{key}={g[key]}')
        try:
            given[key] = convert(text, kind)
        except (ValueError, OverflowError):
            wanted = 'true, false, 1 or 0' if kind is bool else f'a value of type {kind.__name__}'
            raise SystemExit(f'{script}: --{key} takes {wanted} (default {g[key]!r}), not {text!r}') from None
    return given


def next_value(words, kind):
    """The value of a setting that has no '=': the next word, or true for a bare bool; None where
    there is none."""
    if kind is bool and not (words and words[0].lower() in ('true', 'false', '0', '1')):
        return 'true'
    if words and not words[0].startswith('--'):
        return words.pop(0)
    return None


def convert(text, kind):
    """Text of the command line as bool, int, float or str; ~/ is the home folder, which a shell
    puts in only after a space. Raises ValueError."""
    if kind is bool:
        if text.lower() not in ('true', 'false', '1', '0'):
            raise ValueError(text)
        return text.lower() in ('true', '1')
    if kind is int and not text.lstrip('+-').isdigit():        # 1e5 is an int, 1.5 is none
        if not float(text).is_integer():
            raise ValueError(text)
        return int(float(text))
    if kind is str:
        return os.path.expanduser(text)
    return kind(text)


def print_help(g):
    """The docstring of a script and the block between its rules: settings, limits, recipes."""
    with open(g['__file__'], encoding='utf-8') as file:
        text = file.read()
    about = ast.get_docstring(ast.parse(text), clean=False)    # python -OO keeps no __doc__
    block = text.split(RULE)[1]
    print(f'{about.strip()}\n\nSettings (--name=value):\n{block.strip()}')


def check_limits(script, settings, limits, defaults):
    """`limits` {setting: limit}: a tuple of words is a choice, a pair of numbers a range, a number
    the least value."""
    for key, value in settings.items():
        wanted = wanted_instead(key, value, limits.get(key), defaults[key])
        if wanted:
            raise SystemExit(f'{script}: --{key}={value} cannot be, expected {wanted}')
    if settings.get('p_full', 0) + settings.get('p_near', 0) > 1 + 1e-6:
        raise SystemExit(f'{script}: --p_full={settings["p_full"]} and --p_near={settings["p_near"]} are shares of one '
                         'whole, above 1')


def check_used(script, settings, given, uses, in_use, defaults):
    """Exit with one line where a setting is given that has no effect. `uses` {choice: settings} says
    what counts only with a choice, in_use(settings) which choices are made; a setting that `uses`
    does not name always counts, and so does one that is switched off."""
    made = in_use(SimpleNamespace(**settings))
    for key in given:
        owners = [choice for choice, names in uses.items() if key in names.split()]
        off = not settings[key] and settings[key] == defaults[key]
        if owners and not set(owners) & set(made) and not off:
            raise SystemExit(f'{script}: --{key} has no effect here; it goes with {", or with ".join(owners)}')


def wanted_instead(key, value, limit, default):
    """What a setting should be, in words, or '' where its value is fine."""
    if isinstance(value, float) and not math.isfinite(value):
        return 'a finite number'
    if key == 'seed' and abs(value) >= 2 ** 63:
        return 'below 2 ** 63'
    if key in ('data', 'ckpt', 'out_dir') and value == '' and default:
        return 'a name'
    if limit is None:
        return ''
    if not isinstance(limit, tuple):
        return '' if value >= limit else f'at least {limit:g}'
    if isinstance(limit[0], str):
        return '' if value in limit else f'one of {", ".join(map(repr, limit))}'
    least, most = limit
    return '' if least <= value <= most else f'between {least:g} and {most:g}'


def report_error(kind, error, trace):
    """sys.excepthook: what a user can mend ends with one line, a mistake of ours with its
    traceback. A user's is what a `raise` of our own code makes a ValueError or OSError."""
    if kind is KeyboardInterrupt:
        print('stopped', file=sys.stderr)
    elif issubclass(kind, (ValueError, OSError)) and raised_on_purpose(trace):
        print(f'{os.path.basename(sys.argv[0])}: {error}', file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def raised_on_purpose(trace):
    """Told by the instruction, not by reading its line: the file may be edited while a run goes
    on."""
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    path = os.path.realpath(code.co_filename)
    ours = path.startswith(HERE + os.sep) and 'site-packages' not in path
    return ours and dis.opname[code.co_code[trace.tb_lasti]] == 'RAISE_VARARGS'


class Console(io.FileIO):
    """Where standard output or error goes. What cannot be written, as nobody reads any more (a
    closed pipe or terminal) or the disk is full, is dropped: it never ends a run."""

    def write(self, data):
        try:
            written = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written       # None, too, where it would have to wait


def console(stream):
    """sys.stdout or sys.stderr over a `Console`; letters that it lacks are escaped. None is a
    stream that was closed from the start; the streams of a notebook and the console of Windows
    stay as they are."""
    if stream is None:
        return open(os.devnull, 'w', encoding='utf-8')
    if not isinstance(stream, io.TextIOWrapper) or os.name == 'nt' and stream.isatty():
        return stream
    raw = Console(stream.fileno(), 'w', closefd=False)
    return io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, 'backslashreplace', line_buffering=True)


# -----------------------------------------------------------------------------
# Processes

LAUNCHER = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')


def launched():
    """What torchrun says in environment variables -> number of this process, of all processes, and
    of this one on its machine; 0, 1, 0 where it says nothing. Raises ValueError where half of them
    are left over from something else, or they cannot be."""
    found = {key: os.environ[key] for key in LAUNCHER if os.environ.get(key)}
    if not found:
        return 0, 1, 0
    numbers = [int(value) for key, value in found.items() if key != 'MASTER_ADDR' and value.isdecimal()]
    if len(found) == 5 and len(numbers) == 4:
        rank, world, local, port = numbers
        if rank < world and local < world and port < 2 ** 16:
            return rank, world, local
    listed = ' '.join(f'{key}={value}' for key, value in found.items())
    raise ValueError(f'the environment says {listed}, expected all of {", ".join(LAUNCHER)} as torchrun sets them, '
                     f'with RANK below WORLD_SIZE; start it with torchrun, or for one process: unset {" ".join(found)}')


def start_run(batch_size=0, micro_batch=0, half=('cuda', 'cpu')):
    """Join the torchrun group, if there is one, and split the global batch. -> run, with rank,
    world (processes), device, autocast, fast_dtype (bfloat16 where the device computes in it), micro
    (images a forward pass), accumulate (passes an update). One process per GPU with nccl, gloo on the
    CPU; bf16 autocast on the devices in `half` that compute in it, else float32, and no float16
    path."""
    rank, world, local = launched()
    cuda = torch.cuda.is_available()
    device = torch.device('cpu')
    if cuda and local >= torch.cuda.device_count():
        raise ValueError(f'process {local} of this machine finds {torch.cuda.device_count()} GPU(s); start as many '
                         'processes as there are, with --nproc_per_node of torchrun')
    if cuda:
        device = torch.device(f'cuda:{local}')
        torch.cuda.set_device(device)
    if world > 1:                                              # six hours: rank 0 may train a teacher
        if rank == 0:
            print(f'waiting for {world - 1} more process(es) at port {os.environ["MASTER_PORT"]}')
        try:
            dist.init_process_group('nccl' if cuda else 'gloo', timeout=timedelta(hours=6))
        except RuntimeError as error:                          # a port in use, a host that is not there
            raise ValueError(f'{world} processes cannot meet: {str(error).splitlines()[0]}; try another '
                             '--master_port of torchrun') from None
    can = has_bf16(cuda)
    bf16 = can and device.type in half
    precision = 'bf16 autocast' if bf16 else 'float32'
    if not can:
        precision += f', the {"GPU" if cuda else "CPU"} has no bf16'
    if rank == 0:
        name = torch.cuda.get_device_name(device) if cuda else 'cpu'
        print(f'{world} process(es) on {name}: {precision}')
    micro, accumulate = split_batch(batch_size, micro_batch, world)
    return SimpleNamespace(rank=rank, world=world, device=device, micro=micro, accumulate=accumulate,
                           fast_dtype=torch.bfloat16 if can else torch.float32,
                           autocast=torch.autocast(device.type, torch.bfloat16, enabled=bf16))


@functools.cache
def has_bf16(cuda):
    if cuda:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = getattr(torch.cpu, 'get_capabilities', dict)()    # from torch 2.11 on
    return bool(capabilities.get('avx512_bf16'))


def split_batch(batch_size, micro_batch, world):
    """Global batch -> (images per forward on one device, accumulation steps). Raises ValueError if
    it does not divide."""
    micro = micro_batch or max(1, batch_size // world)
    if batch_size % (micro * world):
        best = max(1, round(batch_size / (micro * world))) * micro * world
        raise ValueError(f'batch_size {batch_size} is not a multiple of {world} process(es) x {micro} per process = '
                         f'{micro * world}; try --batch_size={best}')
    return micro, batch_size // (micro * world)


def out_folder(out_dir, teacher):
    """--out_dir, or where it is '': out/ for our own teacher, out/NAME for a published one."""
    if out_dir:
        return out_dir
    return 'out' if teacher == 'ours' else f'out/{teacher}'


def end_run():
    """The last line of a script: leave the group together, as rank 0 may still be measuring, and end
    the process at once. At its usual end threads of gloo that still run abort it, now and then."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def is_rank0():
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text):
    """One line on the console, by one process, above a progress bar if there is one."""
    if is_rank0():
        tqdm.write(text)


def rank_and_world():
    """The number of this process, and how many there are."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def meet():
    """Wait for all processes."""
    if dist.is_initialized():
        dist.barrier()


def agreed(flag, now, run):
    """Rank 0's flag on every process, where all of them ask `now`."""
    if run.world > 1 and now:
        shared = torch.tensor(float(flag), device=run.device)
        dist.broadcast(shared, 0)
        return bool(shared)
    return flag


def sum_over_processes(tensor):
    """In place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)


def same_weights(*networks):
    """Give every process rank 0's weights and buffers."""
    if dist.is_initialized():
        for network in networks:
            for tensor in network.state_dict().values():
                dist.broadcast(tensor, 0)


# Ctrl-C; a system that shuts down; a closed terminal; a queue's time limit (Slurm's --signal, ulimit -St)
STOP_SIGNALS = ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGQUIT', 'SIGUSR1', 'SIGUSR2', 'SIGALRM', 'SIGVTALRM', 'SIGXCPU')


def on_stop_signals(handler):
    """Let handler(number, frame) answer every signal that asks for a stop -> {signal: what answered
    before}. Under nohup a closed terminal asks for nothing."""
    before = {}
    for name in STOP_SIGNALS:
        number = getattr(signal, name, None)                   # Windows has but two
        under_nohup = name == 'SIGHUP' and number and signal.getsignal(number) == signal.SIG_IGN
        if number and not under_nohup:
            before[number] = signal.signal(number, handler)
    return before


class Stop:
    """A signal asks for a stop at the end of the step, so that the files stay usable; Ctrl-C or
    SIGTERM once more stops at once, but not within a second: a terminal, torchrun and distill.py
    may all pass on the same wish."""

    def __init__(self):
        self.asked = 0.0                                       # when
        self.said = False
        self.before = on_stop_signals(self.ask)

    def ask(self, number, frame):
        again = number in (signal.SIGINT, signal.SIGTERM)
        if again and self.asked and time.time() - self.asked > 1:
            self.asked = time.time()                           # once: what clears up is left in peace
            raise KeyboardInterrupt
        self.asked = self.asked or time.time()

    def now(self, step, device):
        """True once any process was asked, which is said; processes agree every 10 steps."""
        stopping = self.asked > 0
        if dist.is_initialized():
            if step % 10:
                return False
            flag = torch.tensor(float(stopping), device=device)
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            stopping = bool(flag)
        if stopping and not self.said:
            self.said = True
            say('stopping; --resume continues from what is saved, if anything is yet')
        return stopping

    def over(self):
        """The loop has ended and is saved: a signal ends what follows at once, unless one has come,
        which may be passed on once more."""
        if not self.asked:
            for number, handler in self.before.items():
                signal.signal(number, handler)


# -----------------------------------------------------------------------------
# Seeds

def rng_for(seed, step, part=0, device='cpu'):
    """The seed rule: one generator per (seed, step, part), part being the micro-batch's number over
    all processes. So a run draws the same numbers on 1 or 8 processes with equal micro-batches, and
    resuming needs no RNG state."""
    digest = hashlib.sha256(repr((seed, step, part)).encode()).digest()
    number = int.from_bytes(digest[:8], 'little') >> 1
    return torch.Generator(device).manual_seed(number)


def micro_rng(seed, step, k, run, draw='', device=None):
    """The generator of this process's k-th micro-batch in an update, `draw` a word for a further
    one."""
    part = run.rank * run.accumulate + k
    if draw:
        part = (draw, part)
    return rng_for(seed, step, part, device or run.device)


def image_rngs(seed, index, device='cpu'):
    """One random generator per image: the same image whatever the batch."""
    return [rng_for(seed, int(i), 'image', device) for i in index]


# -----------------------------------------------------------------------------
# Optimizers

def rate_law(step, steps, warmup, cooldown):
    """The learning-rate law of the stages, as a share of the peak: linear warm-up over `warmup`
    steps; over the last share `cooldown` of the steps down to 5 % on a straight line (0: constant,
    as in the paper)."""
    rising = (step + 1) / max(1, warmup)
    if not cooldown:
        return min(1, rising)
    falling = max(0.05, (1 - step / max(1, steps)) / cooldown)
    return min(1, rising, falling)


def cosine_law(step, steps, warmup=1, floor=0.0):
    """The law of the small networks that are trained here: linear warm-up, and from 1 to `floor`
    along half a cosine."""
    cosine = (1 + floor) / 2 + (1 - floor) / 2 * math.cos(math.pi * step / max(1, steps))
    return min(1, (step + 1) / warmup) * cosine


def set_rates(optimizers, factor):
    """Every optimizer of the list to `factor` times its peak rate."""
    for optimizer in optimizers:
        optimizer.param_groups[0]['lr'] = optimizer.peak * factor


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon (Jordan et al. 2024: Nesterov momentum, its singular values pushed to about
    1 by five Newton-Schulz steps) with matrices of one shape as one batch, and in float32 where the
    device has no bfloat16."""

    def __init__(self, params, lr, weight_decay=0.0, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        for p in self.param_groups[0]['params']:
            self.state[p]['momentum_buffer'] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        group, shapes = self.param_groups[0], {}
        for p in group['params']:
            if p.grad is not None:
                shapes.setdefault(p.shape, []).append(p)
        for (rows, columns), some in shapes.items():           # equal shapes as one batch: few launches
            grads = [p.grad for p in some]
            averages = [self.state[p]['momentum_buffer'] for p in some]
            torch._foreach_lerp_(averages, grads, 1 - group['momentum'])
            moved = torch.stack(grads).lerp(torch.stack(averages), group['momentum'])
            wide = orthogonalised(moved.mT if rows > columns else moved)
            update = (wide.mT if rows > columns else wide).to(grads[0].dtype)
            scale = max(1, rows / columns) ** 0.5
            torch._foreach_mul_(some, 1 - group['lr'] * group['weight_decay'])
            torch._foreach_add_(some, update.unbind(), alpha=-group['lr'] * scale)


def orthogonalised(x):
    """Wide matrices (n, rows, columns) with their singular values pushed towards 1: five steps
    of the quintic a s + b s^3 + c s^5 with the coefficients that Jordan et al. tuned for speed
    near 0."""
    a, b, c = 3.4445, -4.775, 2.0315
    x = x.to(torch.bfloat16 if has_bf16(x.is_cuda) else torch.float32)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    return x


def make_optimizers(network, muon_lr, lr, betas, weight_decay=0.0, momentum=0.95):
    """Muon for the matrices of trunk or heads, AdamW for the rest -> list of optimizers; muon_lr =
    0 gives everything to AdamW, as the papers do. Each keeps its peak rate in optimizer.peak for
    `set_rates`."""
    trunk, rest = [], []
    for name, p in network.named_parameters():
        in_trunk = name.startswith(('blocks', 'first', 'last', 'heads'))
        if not p.requires_grad:
            continue
        if muon_lr and p.dim() == 2 and in_trunk:
            trunk.append(p)
        else:
            rest.append(p)
    decay = 0 if muon_lr else weight_decay
    optimizers = [torch.optim.AdamW(rest, lr=lr, betas=betas, weight_decay=decay, fused=rest[0].is_cuda)]
    if trunk:
        optimizers.append(Muon(trunk, muon_lr, weight_decay, momentum))
    for optimizer in optimizers:
        optimizer.peak = optimizer.param_groups[0]['lr']       # not saved: a resumed run takes the flag's
    return optimizers


def millions(network):
    """Its parameters."""
    return sum(p.numel() for p in network.parameters()) / 1e6


def trained(network):
    """The parameters that get gradients."""
    return [p for p in network.parameters() if p.requires_grad]


def take_step(network, optimizers, run, clip):
    """Average the accumulated gradients over micro-batches and processes, clip, step -> gradient
    norm."""
    return apply_gradients(trained(network), optimizers, run.accumulate * run.world, clip)


def apply_gradients(parameters, optimizers, parts, clip=1.0):
    """Divide accumulated gradients by `parts`, average them over all processes with one all-reduce,
    clip their norm (0: no limit), step. -> the norm before the clipping."""
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    if dist.is_initialized():
        dist.all_reduce(flat)
    flat /= parts
    pieces = flat.split([g.numel() for g in grads])
    torch._foreach_copy_(grads, [piece.view_as(g) for g, piece in zip(grads, pieces)])
    norm = nn.utils.clip_grad_norm_(parameters, clip or math.inf)
    for optimizer in optimizers:
        optimizer.step()
    return norm


def check_finite(step, numbers):
    """End the run before a broken state is saved: of the numbers of a step, `norm` is a gradient
    norm that --lr governs, `norm_x` one that --x_lr does. Raises ValueError."""
    for name, norm in numbers.items():
        if name.startswith('norm') and not torch.isfinite(norm):
            setting = f'{name}_lr'.removeprefix('norm').lstrip('_')
            raise ValueError(f'step {step}: a gradient is not finite; lower --{setting}. The last checkpoint is good: '
                             '--resume continues from it.')


def ema_update(average, network, decay, step):
    """average <- d average + (1 - d) network, with d = min(decay, (1 + step) / (10 + step))."""
    d = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - d)


def compile_blocks(*networks, twice=False):
    """torch.compile block by block: equal blocks share one compilation. `twice`: backward passes a
    graph again."""
    import torch._dynamo
    import torch._functorch.config
    torch._dynamo.config.recompile_limit = 32                  # with or without gradient, other batches
    torch._functorch.config.donated_buffer = not twice
    for network in networks:
        for block in network.blocks:
            block.compile()


def recompute(modules):
    """In place: these modules keep only their inputs for the backward pass, and compute once more there:
    less memory, more time."""
    for module in modules:
        module.forward = forgetful(module.forward)


def forgetful(forward):
    def call(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)
    return call


# -----------------------------------------------------------------------------
# Log, progress, benchmark

SAY_WHERE = ('out_dir', 'grid', 'png_dir', 'npz', 'name')     # settings that say where something is written


@contextlib.contextmanager
def writing(path):
    """Make the folder of `path`; inside, a full disk or a missing permission raises OSError with
    one line."""
    options = [f'--{key}' for key in SAY_WHERE if key in OWN_SETTINGS]
    elsewhere = ' or '.join(options) or 'folder'
    try:
        os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
        yield
    except (OSError, RuntimeError) as error:                   # of torch.save
        reason = str(error) or type(error).__name__
        raise OSError(f'cannot write {path}: {reason.splitlines()[0]}. Earlier checkpoints are untouched; free some '
                      f'space or permissions, or choose another {elsewhere}') from None


@contextlib.contextmanager
def replacing(path):
    """A temporary name, renamed to `path` at the end of the block, so that the file there is always
    whole. Raises OSError as `writing` does."""
    temporary = f'{path}.{os.getpid()}.tmp'
    with writing(path):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):                 # a full disk need not stay full
                os.remove(temporary)


def try_writing(path):
    """Raise OSError, before slow work, where no file can be written to `path`."""
    with writing(path):
        if os.path.isdir(path):
            raise IsADirectoryError('it is a folder')
        if os.path.exists(path) and not os.access(path, os.W_OK):
            raise PermissionError('it is write-protected')
        with tempfile.TemporaryFile(dir=os.path.dirname(path) or '.') as file:
            file.write(bytes(1024))                            # a full disk, too


def writable(path):
    """The path of a file to write, or, where its folder takes no file, FOLDER-NAME in out/ of the
    current folder, which is said. Raises OSError where that takes none, either."""
    try:
        try_writing(path)
        return path
    except OSError:
        folder, name = os.path.split(os.path.abspath(path))
    elsewhere = os.path.join('out', f'{os.path.basename(folder)}-{name}')
    try_writing(elsewhere)
    say(f'note: {folder} takes no file {name}; it is written to {elsewhere}')
    return elsewhere


UNNAMED = ('ckpt', 'teacher', 'batch', 'metrics', 'sweep', 'inception_sha256')    # what is in no name of results


def results_name(kind, config, changed):
    """KIND-setting=value-..., which has each setting of `config` that the command line has `changed`, so
    that no measurement replaces another's."""
    parts = [f'{key}={short(config[key])}' for key in sorted(changed) if key not in UNNAMED]
    name = '-'.join([kind, *parts])
    return name if len(name) <= 180 else f'{kind}-{short(name)}'


def results_files(stem, kind, config, changed):
    """Where numbers are written: STEM-KIND-setting=value.json, and STEM-KIND.json, which holds the newest.
    That they can be written is tried at once: OSError."""
    name = results_name(kind, config, changed)
    files = [writable(f'{stem}-{name}.json')]
    if name != kind:
        files.append(writable(f'{stem}-{kind}.json'))
    return files


def short(value):
    """A value for the name of a file, with a digest where it is too long or holds other signs."""
    text = str(value)
    if re.fullmatch(r'[\w.+-]{0,30}', text, re.ASCII):
        return text
    plain = re.sub(r'[^\w.+-]', '_', os.path.basename(text), flags=re.ASCII)
    return f'{plain[:20]}.{hashlib.sha256(text.encode()).hexdigest()[:8]}'


def smoothed(smooth, numbers, keys, share=0.05):
    """Running means {key: tensor} of the numbers of a step, those of `keys` that are there; changed
    in place."""
    for key in keys:
        if key in numbers:
            smooth[key] = torch.lerp(smooth[key], numbers[key], share) if key in smooth else numbers[key]


def rounded(numbers):
    """Numbers for a log line, as floats of five decimals."""
    return {key: round(float(value), 5) for key, value in numbers.items()}


def progress(total, desc, initial=0):
    """A progress bar on rank 0 with time left; one line every 20 s where the output is a file."""
    seconds = 0.5 if sys.stderr.isatty() else 20
    return tqdm(total=total, initial=initial, desc=desc, disable=not is_rank0(), dynamic_ncols=True,
                mininterval=seconds, maxinterval=30)


def timed(call, repeat, device):
    """Seconds per call of `call`, the device synchronised before and after."""
    synchronise(device)
    start = time.time()
    for _ in range(repeat):
        call()
    synchronise(device)
    return (time.time() - start) / repeat


def synchronise(device):
    if device.type == 'cuda':
        torch.cuda.synchronize()


def report_bench(step, images_per_step, run):
    """Time 20 calls of `step` after 3 of warm-up and print ms, images/s, share of the matmul peak
    and peak memory. FLOPs are counted by torch over one more step; the peak is a large matmul
    measured in the same run."""
    from torch.utils.flop_counter import FlopCounterMode
    timed(step, 3, run.device)
    seconds = timed(step, 20, run.device)
    memory = peak_memory(run.device)
    with FlopCounterMode(display=False) as counter:    # last: torch.compile gives up on code that first runs under it
        step()
    flops = counter.get_total_flops()
    peak = matmul_peak(run)
    if is_rank0():
        print(f'bench: ms_per_step {seconds * 1e3:.1f}, images_per_s {images_per_step / seconds:.1f}, gflop_per_step '
              f'{flops / 1e9:.2f}, peak_gflops {peak / 1e9:.1f}, share_of_peak {flops / seconds / peak:.3f}, '
              f'peak_memory_mb {memory / 2 ** 20:.0f}')


def peak_memory(device):
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated()
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_peak(run):
    """FLOP/s of one large matrix product in the precision of the run."""
    n = 8192 if run.device.type == 'cuda' else 1536
    a = torch.randn(n, n, device=run.device)
    with run.autocast:
        if torch.is_autocast_enabled(run.device.type):
            a = a.to(torch.bfloat16)

        def product():
            return a @ a
        timed(product, 3, run.device)
        return 2 * n ** 3 / timed(product, 5, run.device)
