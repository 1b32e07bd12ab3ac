"""
The harness of test_all.py and common/test_*.py: runs of the scripts with tiny settings, networks of a
few thousand weights, comparisons, the runner. Tests are plain functions; pytest finds them too.
"""
import atexit
import contextlib
import fcntl
import functools
import glob
import inspect
import io
import json
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace
from unittest import SkipTest

import numpy as np

GPUS = {key: os.environ[key] for key in ('CUDA_VISIBLE_DEVICES',) if key in os.environ}
os.environ['CUDA_VISIBLE_DEVICES'] = ''        # before torch looks: one test alone is for a GPU
import torch
import torch._dynamo                           # an optimizer imports it: once here, not in each forked run
import torch.nn.functional as F
from PIL import Image

from common import maskgen, meissonic
from common.maskgen import MaskGen, TATiTok
from common.meissonic import Meissonic
from common.metrics import toy_features
from common.published import SAFETENSORS
from common.teachers import published_name, published_tokenizer_name
from model import MDM
from tokenizer import Tokenizer

torch.set_num_threads(1)                       # two workers share two cores, and they fork

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ALONE = dict(os.environ, OMP_NUM_THREADS='1')
SCRIPTS = ('tokenizer.py', 'model.py', 'distill.py', 'gan.py', 'reward.py')    # in the order of a run


# -----------------------------------------------------------------------------
# Running the scripts

OFTEN = ['--batch_size=8', '--save_every=4', '--log_every=2']
TINY = {
    'tokenizer.py': ['--ch=8', '--ch_mult=1,1,2', '--n_codes=32', '--steps=12', '--warmup_free=4'],
    'model.py': ['--D=32', '--depth=2', '--n_head=2', '--steps=8', '--n_images=256'],
    'distill.py': ['--steps=12', '--n_eval=40', '--n_reference=200', '--teacher_steps=3'],
    'gan.py': ['--steps=12', '--n_eval=40', '--n_reference=200', '--teacher_steps=3',
               '--disc_warmup=2', '--spectral'],
    'reward.py': ['--steps=8', '--n_eval=20', '--n_reference=100', '--teacher_steps=2',
                  '--reward_steps=3', '--reward_batch=16', '--patience=9'],
}
IDLE = {                                       # which of these have no effect beside another setting
    '--data=/': ['--n_images=256'],
    '--held_out=': ['--reward_steps=3', '--reward_batch=16'],    # and w_clip is 0
    '--w_gan=0': ['--disc_warmup=2', '--spectral'],
}
INPUTS = {                                     # what a script finds in its folder
    'tokenizer.py': [],
    'model.py': ['tokenizer.pt'],
    'distill.py': ['tokenizer.pt', 'model.pt', 'reader-*.pt'],
    'gan.py': ['model.pt', 'distill.pt', 'tokens-*.npy', 'images-*.npy', 'reader-*.pt'],
    'reward.py': ['model.pt', 'distill.pt', 'rewards.pt', 'reader-*.pt'],
}

# Lines of Python that run before a script, as `before`
KILL = """
import os, signal, torch
real, left = {call}, [{nth}]
def deadly(*args, **options):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.{signal})
    return real(*args, **options)
{call} = deadly
"""
PRECISION = """
import torch
import torch._dynamo                           # an optimizer imports it: once here, not in each forked run
can = dict(getattr(torch.cpu, 'get_capabilities', dict)(), avx512_bf16={})    # True: bf16, False: float32
torch.cpu.get_capabilities = lambda: can
"""
TRACED = """
import torch
import torch._dynamo                           # an optimizer imports it: once here, not in each forked run
def compile(module):
    module._compiled_call_impl = torch.compile(module._call_impl, backend='aot_eager')
torch.nn.Module.compile = compile
"""
FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))    # no file beyond 2 kB
"""
QUICK = """
from common import reader
reader.STEPS, reader.N_IMAGES = 4, 200
"""
ON_GPU = f"""
import os
del os.environ['CUDA_VISIBLE_DEVICES']
os.environ.update({GPUS})
"""


def run(script, *arguments, processes=1, torchrun=False, before=''):
    """Run a script with its tiny settings -> (exit code, output), as run('gan.py', '--steps=3') or
    run('gan.py --steps=3'). `before`: lines of Python to run first. Its processes are forked off this
    one, which has imported torch already; a GPU does not survive that, and `torchrun` does it as a
    user does."""
    script, *settings = shlex.split(script)
    command = [os.path.join(HERE, script)]
    if script in TINY:
        command += TINY[script] + OFTEN
    command += [*settings, *arguments]
    for switch, idle in IDLE.items():
        if any(word.startswith(switch) for word in command):
            command = [word for word in command if word not in idle]
    if torchrun or before == ON_GPU:
        return run_anew(command, processes, before)
    return run_forked(command, processes, before)


def run_forked(command, processes, before):
    context = multiprocessing.get_context('fork')
    places = [{}]
    if processes > 1:
        places = launched_as(processes)
    with tempfile.TemporaryFile('w+') as output:
        group = [context.Process(target=forked, args=(command, before, output.fileno(), place)) for place in places]
        for child in group:
            child.start()
        alive = group
        while alive:
            multiprocessing.connection.wait([child.sentinel for child in alive])
            alive = [child for child in alive if child.is_alive()]
            if any(child.exitcode for child in group):
                for child in group:                    # the others would wait for it
                    child.kill()
        output.seek(0)
        codes = [child.exitcode for child in group if child.exitcode]
        return codes[0] if codes else 0, output.read()


def launched_as(processes):
    """The environment variables that torchrun sets, for each process."""
    with socket.socket() as some:
        some.bind(('localhost', 0))
        port = some.getsockname()[1]                   # free, and so in a moment
    common = dict(WORLD_SIZE=f'{processes}', MASTER_ADDR='localhost', MASTER_PORT=f'{port}')
    return [dict(common, RANK=f'{rank}', LOCAL_RANK=f'{rank}') for rank in range(processes)]


def forked(command, before, output, place):
    """What a new python would do with `command`; `place` is what torchrun would tell it."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = open(1, 'w', buffering=1, closefd=False)
    sys.stderr = open(2, 'w', buffering=1, closefd=False)
    os.chdir(HERE)
    os.environ.update(ALONE)
    os.environ.update(place)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)       # also where the tests run under nohup
    sys.argv = command
    exec(before, {})
    exec(QUICK, {})
    try:
        runpy.run_path(command[0], None, '__main__')
    except (Exception, KeyboardInterrupt):
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def run_anew(command, processes, before):
    launch = [sys.executable]
    if processes > 1:
        launch += ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={processes}',
                   '--no-python', '--', sys.executable]        # without -- it takes --n for its own
    start = 'import runpy, sys\nrunpy.run_path(sys.argv.pop(1), None, "__main__")'
    launch += ['-c', before + QUICK + start]
    done = subprocess.run(launch + command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          timeout=600, env=ALONE, cwd=HERE)
    return done.returncode, done.stdout


def must_run(*arguments, **options):
    """`run`, which must end well -> output."""
    code, text = run(*arguments, **options)
    assert code == 0, f'{arguments} failed:\n{text[-3000:]}'
    return text


def must_refuse(*arguments, words, **options):
    """The script ends with exit code 1 and, instead of a traceback, a message that contains `words`."""
    code, text = run(*arguments, **options)
    assert code == 1 and 'Traceback' not in text and words in text, (arguments, text[-1500:])


shared = ''                                    # a folder that the workers of `run_tests` share


@functools.cache
def shared_folder():
    """A folder that lives as long as the tests run."""
    if shared:
        return shared
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return folder


@contextlib.contextmanager
def made_once(name):
    """`with made_once('x') as (folder, done): ...` what stands inside fills the shared folder x unless it is done. The
    first worker that asks does it, the other waits. Nothing may be written into the folder later."""
    folder = os.path.join(shared_folder(), name)
    os.makedirs(folder, exist_ok=True)
    mark = os.path.join(folder, 'done')
    with open(f'{folder}/lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder, os.path.exists(mark)
        pathlib.Path(mark).touch()


@functools.cache
def tiny_run():
    """Every stage, trained once with the tiny settings -> (folder, {script: what it printed})."""
    with made_once('tiny') as (folder, done):
        scripts = () if done else SCRIPTS
        for script in scripts:
            text = must_run(script, f'--out_dir={folder}')
            pathlib.Path(f'{folder}/{script}.txt').write_text(text)
    return folder, {script: pathlib.Path(f'{folder}/{script}.txt').read_text() for script in SCRIPTS}


def ready_for(script, folder):
    """A folder with the files of the tiny run that `script` needs (they are replaced, never changed)."""
    os.makedirs(folder, exist_ok=True)
    for pattern in INPUTS[script]:
        for path in glob.glob(f'{tiny_run()[0]}/{pattern}'):
            os.link(path, f'{folder}/{os.path.basename(path)}')
    return folder


# -----------------------------------------------------------------------------
# What must be true

@contextlib.contextmanager
def exits_with(*words):
    """`with exits_with('no such file', path): load(path)`: what stands inside ends with SystemExit, ValueError or
    OSError, whose one line contains every word."""
    try:
        yield
    except (SystemExit, ValueError, OSError) as error:
        text = str(error)
        assert '\n' not in text, f'more than a line: {text!r}'
        for word in words:
            assert str(word) in text, f'{text!r} lacks {word!r}'
        return
    raise AssertionError(f'no error, expected one with {words}')


def printed(call, *arguments, **options):
    """What call(*arguments, **options) prints. Where its result counts too: `with capture() as text`."""
    with capture() as text:
        call(*arguments, **options)
    return text.getvalue()


def capture():
    """`with capture() as text: ...`, and text.getvalue() is what was printed inside."""
    return contextlib.redirect_stdout(io.StringIO())


def same(a, b, where=''):
    """Two nested containers of tensors are equal bit for bit."""
    if isinstance(a, (list, tuple)):
        a = dict(enumerate(a))
        b = dict(enumerate(b))
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f'{where}.{key}')
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, (where, a, b)


def near(a, b, tolerance=1e-4):
    """Two tensors have one shape and nowhere differ by more than `tolerance`."""
    assert a.shape == b.shape, (a.shape, b.shape)
    difference = (a - b).abs().max()
    assert difference < tolerance, difference


def golden(name):
    """A golden file: inputs and outputs of a published network. Skips the test where there are none."""
    if not os.environ.get('GOLDEN'):
        raise SkipTest('GOLDEN is not set')
    return torch.load(os.path.join(os.environ['GOLDEN'], f'{name}.pt'), weights_only=True)


# -----------------------------------------------------------------------------
# Networks and files to test with

def rng(seed=0):
    """A random generator of torch."""
    return torch.Generator().manual_seed(seed)


def small_model(**changes):
    """A transformer of 16 tokens with random weights, none of them at the zeros and ones of the start."""
    torch.manual_seed(0)
    sizes = dict(N=16, V=12, D=24, depth=2, n_head=2, n_words=5, T=3)
    sizes.update(changes)
    model = MDM(**sizes)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    return model.eval()


UNTRAINED = SimpleNamespace(features=toy_features)             # in the place of a reader


def small_tokenizer():
    """Our own tokenizer, 16 pixels <-> 16 tokens of 12 codes."""
    torch.manual_seed(0)
    return Tokenizer(image_size=16, ch=8, ch_mult='1,1,2', n_res=1, n_codes=12, code_dim=4).eval()


MINI = {'maskgit': dict(N=16, V=32),
        'maskbit': dict(N=32, V=8, bits=3, S=2, post_norm=True, eps=1e-12)}
MINI_TOKENIZER = {'maskgit': dict(n_codes=32, code_dim=5, z=6, mid=2, up=2, attention='2,mid'),
                  'maskbit': dict(n_codes=8, code_dim=3, S=2, mid=1, up=1)}


def mini(kind, **changes):
    """A small transformer of random weights in the shape of a published one."""
    sizes = dict(D=32, n_head=16, n_words=10, T=1, mlp=40, **MINI[kind])
    sizes.update(changes)
    return small_model(**sizes)


def mini_tokenizer(kind, **changes):
    """Its tokenizer, 16 pixels <-> the tokens of `mini`."""
    torch.manual_seed(0)
    sizes = dict(image_size=16, ch=32, ch_mult='1,1,2', n_res=1, groups=32, **MINI_TOKENIZER[kind])
    sizes.update(changes)
    return Tokenizer(**sizes).eval()


def layouts():
    """A small transformer and its tokenizer in our own layout, MaskGIT's and MaskBit's."""
    return [(small_model(), small_tokenizer()),
            (mini('maskgit'), mini_tokenizer('maskgit')),
            (mini('maskbit'), mini_tokenizer('maskbit'))]


def published(network, kind):
    """The weights of a network of ours, `mini` or `mini_tokenizer`, as the published file holds them."""
    state = {}
    for key, value in network.state_dict().items():
        if key == 'codes':                     # a table that is computed
            continue
        if isinstance(network, Tokenizer):
            depth = network.config['ch_mult'].count(',') + 1
            state[published_tokenizer_name(key, kind, depth)] = value
        else:
            state[published_name(key, kind)] = value
    if kind == 'maskgit' and isinstance(network, MDM):
        tables = [state['tok_emb.weight'], state.pop('class_emb.weight')]
        state['tok_emb.weight'] = torch.cat(tables)
        rest = len(state['tok_emb.weight']) - network.V
        state['bias'] = F.pad(state['bias'], (0, rest, 0, 1), value=7.0)    # entries that must be dropped
        return dict(iter=1, global_epoch=1, model_state_dict=state, optimizer_state_dict={})
    return state


def network_of(state, weights='ema'):
    """The transformer that a checkpoint holds, frozen."""
    model = MDM(**state['args']).requires_grad_(False)
    model.load_state_dict(state[weights])
    return model


def picture_folder(root):
    """Twelve good images of every mode in two classes, cat and dog, and two bad files and a dead link."""
    pixels = np.random.RandomState(0).randint(0, 255, (40, 56, 3), dtype=np.uint8)
    rgb = Image.fromarray(pixels)
    grey = Image.fromarray(pixels[..., 0])
    clear = rgb.convert('RGBA')
    clear.putalpha(0)
    files = {
        'cat/a.png': rgb,
        'cat/grey.png': grey,
        'cat/palette.png': rgb.convert('P'),
        'cat/dot.png': rgb.resize((1, 1)),
        'cat/wide.png': rgb.resize((300, 20)),
        'cat/la.png': rgb.convert('LA'),
        'dog/b.jpg': rgb,
        'dog/cmyk.jpg': rgb.convert('CMYK'),
        'dog/alpha.png': clear,
        'dog/grey16.png': Image.fromarray(pixels[..., 0].astype(np.uint16) * 257),
        'dog/bits.png': rgb.convert('1'),
    }
    for path, image in files.items():
        os.makedirs(os.path.dirname(f'{root}/{path}'), exist_ok=True)
        image.save(f'{root}/{path}')
    rgb.convert('P').save(f'{root}/dog/mask.png', transparency=0)
    whole = pathlib.Path(f'{root}/cat/a.png').read_bytes()
    pathlib.Path(f'{root}/cat/truncated.png').write_bytes(whole[:len(whole) // 2])
    pathlib.Path(f'{root}/dog/notes.txt').write_text('not an image')
    os.symlink(f'{root}/nowhere.png', f'{root}/dog/dead_link.png')


# -----------------------------------------------------------------------------
# Files as the hubs have them

def save_safetensors(state, path):
    """Our own writer of the format, so that no test needs the package."""
    letters = {dtype: name for name, dtype in SAFETENSORS.items()}
    header = {'__metadata__': {'format': 'pt'}}
    parts, position = [], 0
    for name, value in state.items():
        part = b''
        if value.numel():
            part = bytes(value.detach().contiguous().flatten().view(torch.uint8).numpy())
        end = position + len(part)
        header[name] = dict(dtype=letters[value.dtype], shape=list(value.shape), data_offsets=[position, end])
        parts.append(part)
        position = end
    write_safetensors(path, json.dumps(header).encode(), b''.join(parts))


def write_safetensors(path, header, data=b''):
    pathlib.Path(path).write_bytes(len(header).to_bytes(8, 'little') + header + data)


def shard(state, folder, stem, ending, save, half=''):
    """Write a state dict as two files and an index, as transformers and diffusers do -> the index."""
    keys, places = sorted(state), {}
    for k in range(2):
        name = f'{stem}{half}-0000{k + 1}-of-00002.{ending}'
        save({key: state[key] for key in keys[k::2]}, folder / name)
        places.update({key: name for key in keys[k::2]})
    index = folder / f'{stem}.{ending}.index{half}.json'
    index.write_text(json.dumps(dict(metadata={'total_size': 1}, weight_map=places)))
    return index


def transformers_or_skip():
    """The package, which only text and published rewards need; quiet, and never on the net."""
    os.environ['HF_HUB_OFFLINE'] = '1'
    try:
        import transformers
    except ImportError:
        raise SkipTest('transformers is not installed (pip install transformers)') from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def save_words(folder, words=()):
    """Files of a CLIP tokenizer that knows letters and these words -> number of ids."""
    letters = [chr(k) for k in range(33, 127)]
    vocab = [*letters, *(letter + '</w>' for letter in letters)]
    merges = []
    for word in words:
        parts = [*word[:-1], word[-1] + '</w>']
        while len(parts) > 1:
            merge = f'{parts[0]} {parts[1]}'
            parts = [parts[0] + parts[1], *parts[2:]]
            if merge not in merges:
                merges.append(merge)
            if parts[0] not in vocab:
                vocab.append(parts[0])
    vocab += ['<|startoftext|>', '<|endoftext|>']
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {word: k for k, word in enumerate(vocab)}
    (folder / 'vocab.json').write_text(json.dumps(numbers))
    (folder / 'merges.txt').write_text('\n'.join(['#version: 0.2', *merges]) + '\n')
    return len(vocab)


TOWER = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, projection_dim=24,
             max_position_embeddings=77, hidden_act='gelu', pad_token_id=0)


def save_tower(folder, vocab_size, spread=0.2, **changes):
    """Save a CLIP text tower of random weights that reads ids of `save_words` -> the tower. The wider they are spread,
    the more different is what it says of two texts."""
    transformers = transformers_or_skip()
    ids = dict(vocab_size=vocab_size, bos_token_id=vocab_size - 2, eos_token_id=vocab_size - 1)
    config = transformers.CLIPTextConfig(**{**TOWER, **ids, **changes})
    torch.manual_seed(0)
    tower = transformers.CLIPTextModelWithProjection(config).eval()
    for p in tower.parameters():
        p.data += spread * torch.randn(p.shape)
    tower.save_pretrained(folder)
    return tower


CLIP_WORDS = ('<pad>', '<start>', '<end>', 'a', 'red', 'circle', 'green', 'blue', 'yellow', 'square')


def tiny_clip(root):
    """Save a random CLIP of the published class with a word tokenizer of its own in root -> the
    network, the ids of 'a red circle' and 'a circle'."""
    transformers = transformers_or_skip()
    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=2, num_attention_heads=2, hidden_act='gelu')
    text = dict(vocab_size=len(CLIP_WORDS), hidden_size=16, intermediate_size=32, max_position_embeddings=12,
                bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes)
    vision = dict(hidden_size=24, intermediate_size=48, image_size=224, patch_size=112, **sizes)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    network = transformers.CLIPModel(config)
    for p in network.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    network.eval().save_pretrained(root)
    save_clip_words(transformers, root)
    ids = torch.tensor([[1, 3, 4, 5, 2] + [0] * 7, [1, 3, 5, 2] + [0] * 8])
    return network, ids


def save_clip_words(transformers, root):
    import tokenizers
    numbers = {word: k for k, word in enumerate(CLIP_WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token='<pad>'))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single='<start> $A <end>', special_tokens=[('<start>', 1), ('<end>', 2)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token='<pad>',
                                                eos_token='<end>')
    fast.save_pretrained(root)


# -----------------------------------------------------------------------------
# Networks that read text

def shake(network, std=0.1, seed=0):
    """Move every weight away from its start, so that a skipped or swapped one shows."""
    numbers = rng(seed)
    with torch.no_grad():
        for p in [*network.parameters(), *network.buffers()]:
            if p is not getattr(network, 'rope', None) and p.is_floating_point():
                p.add_(std * torch.randn(p.shape, generator=numbers))
    return network.eval()


def mini_maskgen(**changes):
    sizes = dict(N=6, V=16, D=24, depth=2, n_head=2, T=5, C=12, micro=8)
    return shake(MaskGen(**{**sizes, **changes}))


def mini_meissonic(**changes):
    sizes = dict(V=16, D=24, n_joint=1, n_single=2, n_head=2, grid=4, T=5, C=10, axes=(4, 2, 6), pool=2)
    return shake(Meissonic(**{**sizes, **changes}))


def mini_tatitok(**changes):
    sizes = dict(image_size=16, patch=4, N=5, V=12, code_dim=6, width=(16, 24), depth=(1, 2), n_head=(2, 3), T=7, C=10)
    return shake(TATiTok(**{**sizes, **changes}))


def mini_vq(**changes):
    sizes = dict(image_size=16, ch=32, ch_mult='1,2,1', n_res=1, n_codes=12, code_dim=5, mid=2, up=2, z=6, groups=32,
                 stem=32, unit_range=True)
    return shake(Tokenizer(**{**sizes, **changes}))


def published_text(network):
    """The weights of a network of ours in the published layout, with all that those files carry."""
    if isinstance(network, Tokenizer):
        return {meissonic.vq_name(key): value for key, value in network.state_dict().items()}
    config = network.config
    if isinstance(network, MaskGen):
        names = maskgen.maskgen_names(config['depth'])
    elif isinstance(network, Meissonic):
        names = meissonic.meissonic_names(config['n_joint'], config['n_single'])
    else:
        names = maskgen.tatitok_names(config['depth'])
    w = {}
    for key, value in network.state_dict().items():
        if not key.startswith('null_'):
            w[maskgen.published_name(key, names)] = value
    if isinstance(network, MaskGen):
        w['embeddings.weight'] = torch.cat([w['embeddings.weight'], torch.full((1001, network.D), 7.0)])
        w['lm_head.weight'] = w['embeddings.weight']
    elif isinstance(network, Meissonic):
        codes, mask = w['embed.embeddings.weight'].split([network.V, 1])
        w['embed.embeddings.weight'] = torch.cat([codes, torch.full((3, network.D), 7.0), mask])
        convolutions = ('embed.conv.weight', 'mlm_layer.conv1.weight', 'mlm_layer.conv2.weight')
        for key in convolutions:
            w[key] = w[key][..., None, None]
        if config['pool'] == 2:
            D = network.D
            w[meissonic.DOWN] = w[meissonic.DOWN].view(D, 2, 2, D).permute(0, 3, 1, 2)
            w[meissonic.UP] = w[meissonic.UP].view(2, 2, D, D).permute(3, 2, 0, 1)
    else:
        w['quantize.embed_prob'] = torch.zeros(network.V)
        w['decoder.mask_token'] = w['decoder.mask_token'][None]
        for key in ('encoder.conv_out.weight', 'decoder.ffn.0.weight'):
            w[key] = w[key][..., None, None]
    return {key: value.contiguous() for key, value in w.items()}


# -----------------------------------------------------------------------------
# The runner

def collected(names):
    """The tests among the globals of a file, in their order."""
    return [test for name, test in names.items() if name.startswith('test_') and inspect.isfunction(test)]


def attempt(test):
    """Run one test -> (outcome, seconds, reason or traceback). A parameter is given an empty folder, as by pytest."""
    torch.manual_seed(0)
    clock = time.time()
    outcome, note = 'passed', ''
    try:
        with tempfile.TemporaryDirectory() as folder:
            test(*[pathlib.Path(folder) for _ in inspect.signature(test).parameters])
    except SkipTest as reason:
        outcome, note = 'skipped', f': {reason}'
    except (Exception, SystemExit):
        outcome, note = 'failed', '\n' + traceback.format_exc()
    return outcome, time.time() - clock, note


def run_tests(tests):
    """Run tests in two processes, print a line each and the counts -> exit code."""
    global shared
    started = time.time()
    counts = dict(passed=0, failed=0, skipped=0)
    workers = min(2, os.cpu_count())
    fork = multiprocessing.get_context('fork')
    with tempfile.TemporaryDirectory() as tempfile.tempdir, ProcessPoolExecutor(workers, fork) as pool:
        shared = tempfile.mkdtemp()
        for test, result in zip(tests, pool.map(attempt, tests)):
            outcome, seconds, note = result
            counts[outcome] += 1
            print(f'{outcome:8s}{seconds:6.1f} s  {test.__name__}{note}', flush=True)
    print(f'{time.time() - started:.0f} seconds')
    print(f'{counts["passed"]} passed, {counts["failed"]} failed, {counts["skipped"]} skipped')
    return int(counts['failed'] > 0)
