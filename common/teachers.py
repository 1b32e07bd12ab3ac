"""
Teachers: `load_teacher` and what surrounds a network; the published MaskGIT and MaskBit files, their names and sizes.
Captions go in, `cond` comes out: no stage knows what a condition is made of.
"""
import copy
import functools
import math
import os
import re
import signal
import subprocess
import sys

import torch
import torch.nn.functional as F

from common.files import exists, fill, load_checkpoint, read_published, restore, shape_of
from common.images import captions_of, open_data, word_encoder
from common.run import HERE
from common.world import WORLDS
from model import MDM
from tokenizer import Tokenizer, bit_rows

KINDS = ('maskgit', 'maskbit')

TRANSFORMERS = {'maskgit': dict(N=256, V=1024, D=768, depth=24, n_head=16, n_words=1000, mlp=3072,
                                post_norm=False, eps=1e-5),
                'maskbit': dict(N=512, V=128, D=1024, depth=24, n_head=16, n_words=1000, mlp=4096,
                                post_norm=True, eps=1e-12, bits=7, S=2)}

TOKENIZERS = {'maskgit': dict(image_size=256, ch=128, ch_mult='1,1,2,2,4', n_res=2, n_codes=1024,
                              code_dim=256, mid=2, up=3, z=256, attention='4,mid', groups=32),
              'maskbit': dict(image_size=256, ch=128, ch_mult='1,1,2,2,4', n_res=2, n_codes=128,
                              code_dim=7, S=2, mid=2, groups=32)}


# -----------------------------------------------------------------------------
# A network with what surrounds it

class Teacher:
    """A network and what surrounds it; a generator's checkpoint is read as one, too.

    kind; net, on `device`, frozen; tokenizer; encode(captions) -> cond; prompts, the captions that
    training draws from, and packed_prompts, as a checkpoint stores them; data, what it was trained
    on ('' if that is not here); words, its vocabulary; classes, the words where a caption is one of
    them, else []; config, its own settings.
    """

    def __init__(self, kind, net, tokenizer, encode, prompts, packed_prompts, data, words, config):
        self.kind, self.net, self.tokenizer, self.encode = kind, net, tokenizer, encode
        self.prompts, self.packed_prompts = prompts, packed_prompts
        self.data, self.words, self.config = data, words, config
        self.device = next(net.parameters()).device
        self.classes = words if net.config.get('T') == 1 else []

    @functools.cached_property
    def source(self):
        """Images like those that it was trained on (see common/images.py)."""
        return open_data(self.data, self.tokenizer.config['image_size'], expected=self.words)

    def examples(self, n):
        """n of the prompts, spread over all of them."""
        return [self.prompts[int(k)] for k in torch.linspace(0, len(self.prompts) - 1, n)]

    def first(self, n):
        """The first n of the prompts, over again where there are fewer."""
        return [self.prompts[k % len(self.prompts)] for k in range(n)]

    def pack(self):
        """What the checkpoint of any stage stores of it, beside weights."""
        return dict(kind=self.kind, args=self.net.config, words=self.words, data=self.data,
                    prompts=self.packed_prompts, tokenizer=self.tokenizer.pack())


def word_teacher(kind, net, tokenizer, words, prompt_ids, data, config, device):
    """A Teacher whose condition is the ids of words; prompt_ids (M, T) are those of the training
    captions."""
    net = net.to(device).eval().requires_grad_(False)
    encode = word_encoder(words, net.config['T'], device)
    prompts = captions_of(prompt_ids, words)
    return Teacher(kind, net, tokenizer.to(device), encode, prompts, prompt_ids, data, words, config)


def unpack(state, device='cpu', weights='ema', tokenizer_path='', path='the checkpoint'):
    """A checkpoint of ours, a teacher's or a generator's -> Teacher. Raises ValueError,
    FileNotFoundError."""
    net = MDM(**state['args'])
    restore(net, state[weights], path, weights)
    tokenizer = Tokenizer.from_checkpoint(state['tokenizer'], tokenizer_path)
    return word_teacher(state.get('kind', 'ours'), net, tokenizer, state['words'], state['prompts'],
                        state['data'], state['config'], device)


def load_teacher(kind, path, tokenizer_path='', data='', n_head=0, device='cpu'):
    """-> Teacher. kind 'ours' reads our model.pt at `path`; maskgit and maskbit read published
    weights (n_head heads, 0: 16), whose words are the class numbers, or the names of the class
    folders if `data` is a folder (sorted, the published order). path 'random' takes random weights.
    Raises ValueError, FileNotFoundError with one line."""
    folder = '' if data in WORLDS else data
    if kind == 'ours':
        state = load_checkpoint(path, 'model', 'Train it with: python model.py, or say where it is: --teacher_ckpt=FILE',
                                fallback=True)
        state['data'] = folder or state['data']                # which may have moved
        return unpack(state, device, path=path)
    net, tokenizer = published_pair(kind, path, tokenizer_path, n_head)
    words = [str(k) for k in range(net.n_words)]
    if folder:
        words = list(open_data(folder, tokenizer.config['image_size']).words)
    if len(words) != net.n_words:
        raise ValueError(f'--data={folder} has {len(words)} class folders, {path} knows {net.n_words} classes')
    labels = torch.arange(net.n_words)[:, None]
    return word_teacher(kind, net, tokenizer, words, labels, folder, {}, device)


def published_pair(kind, path, tokenizer_path, n_head):
    """A published network and its tokenizer, which must be of one release."""
    if path == 'random' and not tokenizer_path:
        tokenizer_path = 'random'
    if not path or not tokenizer_path:
        raise ValueError(f'--teacher={kind} needs --teacher_path=FILE and --tokenizer_path=FILE; README.md says where '
                         'to get them, and --teacher_path=random takes random weights of the published size')
    net = MDM.from_pretrained(kind, path, n_head)
    tokenizer = Tokenizer.from_pretrained(kind, tokenizer_path, math.isqrt(net.L), net.config['S'])
    if kind == 'maskgit' and net.n_words != 1000:              # V was a guess: classes share its table
        net = MDM.from_pretrained(kind, path, n_head, tokenizer.V)
    if (net.N, net.V) != (tokenizer.N, tokenizer.V):
        raise ValueError(f'{path} has {net.N} tokens of {net.V} codes, {tokenizer_path} {tokenizer.N} of '
                         f'{tokenizer.V}: they are not of one release')
    return net, tokenizer


def copy_of(net, weights, path, trained=False, frozen_tables=False, checkpointing=False):
    """A network like `net` with other weights: frozen, or trained but perhaps for its embedding
    tables."""
    copied = copy.deepcopy(net)
    restore(copied, weights, path, 'weights')
    copied.requires_grad_(trained).train(trained)
    copied.checkpointing = checkpointing
    if frozen_tables:
        for table in copied.embedding_parameters():
            table.requires_grad_(False)
    return copied


def same_tokens(loaded, state, path):
    """Raise ValueError unless a teacher and a checkpoint speak of the same tokens: one
    tokenizer."""
    ours, theirs = loaded.tokenizer.pack(), state['tokenizer']
    same = all(ours.get(key) == theirs.get(key) for key in ('kind', 'args', 'digest'))
    if same:
        for key, value in ours.get('net', {}).items():
            same = same and torch.equal(value.cpu(), theirs['net'][key])
    if not same:
        raise ValueError(f'the teacher and {path} have different tokenizers, so their tokens do not mean the same; '
                         'give the teacher of that generator with --teacher_ckpt=...')


def teacher_file(teacher, teacher_path, teacher_ckpt, folder, start=''):
    """Where the teacher is: a published file; or of ours --teacher_ckpt, model.pt beside the
    checkpoint `start`, or model.pt in the folder of the run."""
    if teacher != 'ours':
        return teacher_path
    if teacher_ckpt:
        return teacher_ckpt
    beside = os.path.join(os.path.dirname(start), 'model.pt')
    if start and exists(beside):
        return beside
    return os.path.join(folder, 'model.pt')


# -----------------------------------------------------------------------------
# The first command: what is missing is trained

def train_missing(data, folder, seed):
    """Train tokenizer and teacher of the demo in `folder` if they are missing, or finish them if
    interrupted."""
    if is_done(saved_stage('model', data, folder)):            # it holds its tokenizer
        return
    for script, minutes in (('tokenizer', 3), ('model', 4)):
        state = saved_stage(script, data, folder)
        if is_done(state):
            continue
        path = os.path.join(folder, f'{script}.pt')
        print(f'{path} is {"unfinished" if state else "missing"}: running {script}.py first, expected '
              f'{minutes} minutes on 2 CPU cores', flush=True)
        settings = dict(data=data, seed=seed)
        if state:
            settings = {**state['config'], 'resume': True}
        run_script(script, {**settings, 'out_dir': folder})
        if not is_done(saved_stage(script, data, folder)):
            raise ValueError(f'{script}.py did not finish (see above); the same command continues it')


def saved_stage(script, data, folder):
    """The checkpoint of tokenizer.py or model.py in `folder`, None if there is none. ValueError for
    other data."""
    path = os.path.join(folder, f'{script}.pt')
    if not exists(path):
        return None
    state = load_checkpoint(path, script, 'Delete it to train it again.', fallback=True)
    made_for = state['config']['data']
    if made_for != data:
        raise ValueError(f'{path} was trained on {made_for}, not on {data}; give each data set a folder of its own, '
                         f'--out_dir=out/{os.path.basename(data)}, or, if the same images have only moved: '
                         f'--teacher_ckpt={folder}/model.pt')
    return state


def is_done(state):
    return state is not None and state['step'] >= state['config']['steps']


def run_script(script, settings):
    """Run one of our scripts as one process of its own; a wish to stop is passed on, and it
    saves."""
    command = [sys.executable, os.path.join(HERE, f'{script}.py')]
    command += [f'--{key}={value}' for key, value in settings.items()]
    single = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
    child = subprocess.Popen(command, env=single)

    def pass_on(number, frame):
        child.terminate()                                      # it saves and ends, and so do we
    signal.signal(signal.SIGTERM, pass_on)
    try:
        child.wait()
    except KeyboardInterrupt:                                  # the child got it too, and saves
        child.wait()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# -----------------------------------------------------------------------------
# Published transformers

NAMES = [  # ours                MaskGIT                                 MaskBit; {} is the number of a block
    ('blocks.{}.norm1.', 'transformer.layers.{}.0.norm.', 'transformer.layers.{}.0.norm.'),
    ('blocks.{}.qkv.', 'transformer.layers.{}.0.fn.mha.in_proj_', 'transformer.layers.{}.0.mha.in_proj_'),
    ('blocks.{}.proj.', 'transformer.layers.{}.0.fn.mha.out_proj.', 'transformer.layers.{}.0.mha.out_proj.'),
    ('blocks.{}.norm2.', 'transformer.layers.{}.1.norm.', 'transformer.layers.{}.1.norm.'),
    ('blocks.{}.mlp.0.', 'transformer.layers.{}.1.fn.net.0.', 'transformer.layers.{}.1.net.0.'),
    ('blocks.{}.mlp.2.', 'transformer.layers.{}.1.fn.net.3.', 'transformer.layers.{}.1.net.2.'),
    ('first.0.', 'first_layer.0.', 'first_layer.0.'),
    ('first.1.', 'first_layer.2.', ''),                        # MaskGIT counts its dropouts
    ('first.3.', 'first_layer.4.', ''),
    ('first.4.', 'first_layer.6.', ''),
    ('last.0.', 'last_layer.0.', 'last_layer.0.'),
    ('last.1.', 'last_layer.2.', ''),
    ('last.2.', '', 'last_layer.2.'),
    ('last.3.', 'last_layer.4.', ''),
    ('cond_emb.', 'class_emb.', 'class_emb.'),
    ('output.', '', 'prediction_layer.')]


def published_name(key, kind):
    """Our parameter name of a transformer -> the name in the published file."""
    for ours, maskgit, maskbit in NAMES:
        theirs = maskgit if kind == 'maskgit' else maskbit
        found = re.match(ours.replace('.', r'\.').replace('{}', r'(\d+)'), key)
        if found and theirs:
            return theirs.format(*found.groups()) + key[found.end():]
    return key                                                 # tok_emb, input_proj, pos_emb, bias, codes


def published_transformer(kind, path, n_head=None, V=None):
    """`MDM.from_pretrained`. MaskGIT keeps V codes and K classes in one table; unless given, V is
    the power of two >= 128 that leaves K = 1000, or else the largest that fits."""
    check_kind(kind)
    if path == 'random':
        return seeded(MDM, TRANSFORMERS[kind])
    weights, name = read_published(path)
    w = {}
    for key, value in weights.items():
        if key != 'bits_to_indices':
            w[re.sub('^token_emb', 'input_proj', key)] = value       # the old name, in some released files

    def size(key, *wanted):
        return shape_of(w, name, f'a {kind} transformer', key, *wanted)
    _, length, D = size('pos_emb', 1, 0, 0)
    depth = len({key.split('.')[2] for key in w if key.startswith('transformer.layers.')})
    mlp = size(published_name('blocks.0.mlp.0.weight', kind), 0, D)[0]
    if kind == 'maskgit':
        config = maskgit_config(w, name, size, length, D, V)
    else:
        config = maskbit_config(w, name, size, length, D)
    n_head = n_head or TRANSFORMERS[kind]['n_head']
    if n_head < 1 or D % n_head:
        raise ValueError(f'{name}: width {D} does not fall into {n_head} heads (published: 16); give n_head=... '
                         '(--teacher_heads)')
    fixed = {key: TRANSFORMERS[kind][key] for key in ('post_norm', 'eps')}
    with torch.device('meta'):
        model = MDM(**config, D=D, depth=depth, n_head=n_head, mlp=mlp, **fixed)

    def rename(key):
        return published_name(key, kind)
    return fill(model, w, rename, name)


def maskgit_config(w, name, size, length, D, V):
    """Sizes of a MaskGIT file; its table and bias, which hold codes, mask and classes, are cut in
    `w`."""
    rows = size('tok_emb.weight', 0, D)[0] - 2                 # V + K
    size('bias', length, rows + 2)
    imagenet = rows - 1000 >= 128 and (rows - 1000).bit_count() == 1
    guess = V is None
    if guess and imagenet:
        V = rows - 1000
    elif guess:
        V = 1 << max(1, rows - 1).bit_length() - 1
    if not 0 < V < rows:
        raise ValueError(f'{name}: tok_emb.weight has {rows + 2} rows, expected V + K + 2 with V = {V}')
    if guess and not imagenet:
        print(f'note: {name}: V = {V} codes, K = {rows - V} classes is a guess, as the file tells only V + K; '
              'V=... settles it (a tokenizer given beside it does)')
    codes, classes = w['tok_emb.weight'].split([V + 1, rows + 1 - V])
    w['tok_emb.weight'], w['class_emb.weight'] = codes, classes
    w['bias'] = w['bias'][:length - 1, :V]                     # no class position, no mask, no classes
    return dict(N=length - 1, V=V, n_words=rows - V)


def maskbit_config(w, name, size, length, D):
    """Sizes of a MaskBit file: S codes of k bits a position, where S k columns go in and S 2^k rows
    come out."""
    columns = size('input_proj.weight', D, 0)[1]
    rows = size('prediction_layer.weight', 0, D)[0]
    for S in (2, 1, *range(3, columns + 1)):                   # released: 2
        bits = columns // S
        if columns % S == 0 and S << bits == rows:
            break
    else:
        raise ValueError(f'{name}: prediction_layer.weight has {rows} rows, expected S 2^k where '
                         f'input_proj.weight has S k = {columns} columns; are both of one release?')
    w['codes'] = F.pad(bit_rows(bits), (0, 0, 0, 1))
    n_words = size('class_emb.weight', 0, D)[0] - 1
    return dict(N=(length - 1) * S, V=rows // S, n_words=n_words, bits=bits, S=S)


def check_kind(kind):
    if kind not in KINDS:
        raise ValueError(f'unknown kind {kind!r}; supported: {", ".join(KINDS)}')


def seeded(cls, config):
    """A network of random weights, always the same ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(**config).eval()


# -----------------------------------------------------------------------------
# Published tokenizers

VQGAN = [('.mid.block.0.', '.mid.block_1.'), ('.mid.block.1.', '.mid.block_2.'), ('.mid.attn.0.', '.mid.attn_1.'),
         ('sample.', 'sample.conv.'), ('codebook', 'quantize.embedding')]
MASKBIT = [('.block.', '.res_blocks.'), ('downsample', 'down_conv'), ('upsample', 'upsample_conv')]


def published_tokenizer_name(key, kind, depth):
    """Our parameter name of a tokenizer with `depth` levels -> the name in the published file."""
    if kind == 'maskgit':                                      # taming stores full resolution first
        level = re.match(r'decoder\.up\.(\d+)', key)
        if level:
            key = f'decoder.up.{depth - 1 - int(level[1])}' + key[level.end():]
    for ours, theirs in VQGAN if kind == 'maskgit' else MASKBIT:
        key = key.replace(ours, theirs)
    return key


def published_tokenizer(kind, path, grid=16, S=0):
    """`Tokenizer.from_pretrained`: all sizes are read off the shapes but the grid of an image and
    MaskBit's S (0: as released), which the weights leave open."""
    check_kind(kind)
    if path == 'random':
        tokenizer = seeded(Tokenizer, TOKENIZERS[kind])
    else:
        tokenizer = read_tokenizer(kind, path, grid, S)
    if isinstance(path, (str, os.PathLike)):
        where = path if path == 'random' else os.path.abspath(path)
        tokenizer.source = dict(kind=kind, path=where, grid=grid, S=S, digest=tokenizer.digest())
    return tokenizer.eval().requires_grad_(False)


def read_tokenizer(kind, path, grid, S):
    weights, name = read_published(path)
    unused = 'loss.' if kind == 'maskgit' else 'quantize.'
    w = {key: value for key, value in weights.items() if not key.startswith(unused)}

    def size(key, *wanted):
        return shape_of(w, name, f'a {kind} tokenizer', key, *wanted)
    block = 'block' if kind == 'maskgit' else 'res_blocks'
    depth = max(1, count_numbers(w, r'encoder\.down\.(\d+)\.'))
    ch = size('encoder.conv_in.weight', 0, 3, 3, 3)[0]
    widths = [size(f'encoder.down.{i}.{block}.0.conv2.weight', 0, 0, 3, 3)[0] for i in range(depth)]
    for width in (ch, *widths):
        if width % 32 or width % ch:
            raise ValueError(f'{name}: encoder.conv_in.weight and encoder.down have {[ch, *widths]} channels, '
                             'expected multiples of 32 and of the first. Is this the right file?')
    config = dict(image_size=grid << depth - 1, ch=ch, ch_mult=','.join(str(width // ch) for width in widths),
                  n_res=count_numbers(w, rf'encoder\.down\.0\.{block}\.(\d+)\.'),
                  up=count_numbers(w, rf'decoder\.up\.0\.{block}\.(\d+)\.'), groups=32)
    if kind == 'maskgit':
        n_codes, code_dim = size('quantize.embedding.weight', 0, 0)
        attention = ','.join([*sorted(found_numbers(w, r'encoder\.down\.(\d+)\.attn\.')), 'mid'])
        z = size('encoder.conv_out.weight', 0, 0, 3, 3)[0]
        config |= dict(n_codes=n_codes, code_dim=code_dim, mid=2, attention=attention, z=z)
    else:
        bits = size('encoder.conv_out.weight', 0, 0, 1, 1)[0]
        S = S or 1 + (bits % 2 == 0)                           # released: 2 codes per place
        mid = count_numbers(w, r'encoder\.mid\.res_blocks\.(\d+)\.')
        config |= dict(S=S, n_codes=2 ** (bits // S), code_dim=bits // S, mid=mid)
        w['codes'] = bit_rows(bits // S)
    with torch.device('meta'):
        tokenizer = Tokenizer(**config)

    def rename(key):
        return published_tokenizer_name(key, kind, depth)
    return fill(tokenizer, w, rename, name)


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
