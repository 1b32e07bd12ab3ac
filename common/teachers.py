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

from common.files import (build, check_origin, digest_of, exists, load_checkpoint, note_unfinished,
                          printable, restore)
from common.images import captions_of, open_data, word_encoder
from common.maskgen import MaskGen, TATiTok, published_maskgen, published_tatitok
from common.meissonic import Meissonic, published_meissonic, published_meissonic_vq
from common.published import count_numbers, fill, found_numbers, read_published, seeded, shape_of
from common.run import HERE, LAUNCHER, on_stop_signals, recompute, say
from common.text import PromptFile, RandomText, load_text_encoder, same_prompts
from common.world import WORLDS
from model import MDM, Block
from tokenizer import Attention, ResBlock, Tokenizer, bit_rows, hash_of_weights

KINDS = ('maskgit', 'maskbit', 'maskgen', 'meissonic')
CLASS_KINDS = ('maskgit', 'maskbit')
TEXT_KINDS = ('maskgen', 'meissonic')
NETWORKS = {'maskgen': MaskGen, 'meissonic': Meissonic}        # the others are settings of MDM
RANDOM = ('random', 'random-xl')                               # paths that stand for random weights
ACTIVATIONS = {'maskgen': 'quick_gelu', 'meissonic': 'gelu'}   # of the CLIP towers
NULL_PROMPTS = {
    'maskgen': '',
    'meissonic': 'worst quality, low quality, low res, blurry, distortion, watermark, logo, signature, text, jpeg '
                 'artifacts, signature, sketch, duplicate, ugly, identifying mark'}

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

    kind; net, on `device`, frozen; tokenizer; encode(captions) -> cond, and encode_batch, the same
    for captions that are trained on (at once, not remembered); prompts, the captions that training
    draws from, and packed_prompts, as a checkpoint stores them; data, what it was trained on ('' if
    that is not here); words, its vocabulary; classes, the words where a caption is one of them,
    else []; config, its own settings.
    """

    def __init__(self, kind, net, tokenizer, encode, prompts, packed_prompts, data, words, config, encode_batch=None,
                 encoder=None):
        self.kind, self.net, self.tokenizer, self.encode = kind, net, tokenizer, encode
        self.decoder = tokenizer                               # where its speed counts; see `choose_decoder`
        self.encode_batch = encode_batch or encode
        self.prompts, self.packed_prompts = prompts, packed_prompts
        self.data, self.words, self.config = data, words, config
        self.device = next(net.parameters()).device
        self.classes = words if net.config.get('T') == 1 else []
        self.encoder = encoder                                 # of text; None where words have numbers

    @functools.cached_property
    def source(self):
        """Images like those that it was trained on (see common/images.py)."""
        return open_data(self.data, self.tokenizer.config['image_size'], expected=self.words)

    @functools.cached_property
    def origin(self):
        """What the checkpoints of a stage are made from, for `check_origin`."""
        if self.encoder:
            vocabulary = hash_of_weights(self.encoder.weights())
        elif self.kind in CLASS_KINDS:
            vocabulary = digest_of(len(self.words))            # in their published order, named or not
        else:
            vocabulary = digest_of(self.words)
        teacher = hash_of_weights(dict(self.net.named_parameters()))
        origin = dict(tokenizer=self.tokenizer.digest(), vocabulary=vocabulary, teacher=teacher)
        if self.data:
            origin['data'] = self.source.digest()
        return origin

    def choose_decoder(self, run, in_half, recomputed=False):
        """From here on `decoder`, a copy, decodes in bf16, if asked and where the device computes in it;
        its blocks may compute once more in the backward pass. `tokenizer` stays as it is."""
        dtype = run.fast_dtype if in_half else torch.float32
        self.decoder = self.tokenizer.decoder_in(dtype)
        say(f'decoder in {str(dtype).removeprefix("torch.")}')
        if recomputed:
            blocks = self.decoder.decoder.modules()
            recompute([m for m in blocks if isinstance(m, (Block, ResBlock, Attention))])

    def examples(self, n):
        """n of the prompts, spread over all of them."""
        return [self.prompts[int(k)] for k in torch.linspace(0, len(self.prompts) - 1, n)]

    def first(self, n):
        """The first n of the prompts, over again where there are fewer."""
        return [self.prompts[k % len(self.prompts)] for k in range(n)]

    def pack(self):
        """What the checkpoint of any stage stores of it, beside weights."""
        return dict(kind=self.kind, args=self.net.config, words=self.words, data=self.data, origin=self.origin,
                    prompts=self.packed_prompts, tokenizer=self.tokenizer.pack())


def word_teacher(kind, net, tokenizer, words, prompt_ids, data, config, device):
    """A Teacher whose condition is the ids of words; prompt_ids (M, T) are those of the training
    captions."""
    net = net.to(device).eval().requires_grad_(False)
    encode = word_encoder(words, net.config['T'], device)
    prompts = captions_of(prompt_ids, words)
    return Teacher(kind, net, tokenizer.to(device), encode, prompts, prompt_ids, data, words, config)


def text_teacher(kind, net, tokenizer, encoder, prompts, data, config, device):
    """A Teacher whose condition is what CLIP makes of any text: `encoder` is a TextEncoder. The
    null prompt is filled in, and TA-TiTok's decoder gets its text."""
    net = net.to(device).eval().requires_grad_(False)
    size = float(tokenizer.config['image_size'])
    micro = {'maskgen': [6.5], 'meissonic': [size, size, 0, 0, 6, 0]}[kind]    # score; sizes, crop, score, timestep

    def condition(captions, training):
        words, pooled, guide = encoder.encode(captions, training)
        numbers = torch.tensor([micro], device=device).expand(len(captions), -1)
        if kind == 'maskgen':
            return words, pooled, numbers, guide
        return words, pooled, numbers

    def encode(captions):
        return condition(captions, training=False)

    def encode_batch(captions):
        return condition(captions, training=True)

    def guide(captions):
        return encoder.encode(captions)[2]
    tokenizer.text = guide
    words, pooled, *_ = encode([NULL_PROMPTS[kind]])
    net.null_words.copy_(words)
    net.null_pooled.copy_(pooled)
    packed = prompts.pack() if hasattr(prompts, 'pack') else dict(path='', digest='', first=list(prompts[:256]))
    return Teacher(kind, net, tokenizer.to(device), encode, prompts, packed, data, None, config, encode_batch, encoder)


def unpack_tokenizer(saved, path='', place='the checkpoint'):
    """`Tokenizer.from_checkpoint` with checks of what it reads, and TA-TiTok, which is a class of its
    own."""
    if 'kind' in saved:
        return Tokenizer.from_checkpoint(saved, path)
    cls = TATiTok if 'patch' in saved['args'] else Tokenizer
    tokenizer = build(cls, saved['args'], place)
    restore(tokenizer, saved['net'], place, 'its tokenizer')
    return tokenizer.eval().requires_grad_(False)


def unpack(state, device='cpu', weights='ema', tokenizer_path='', path='the checkpoint', text_path=''):
    """A checkpoint of ours, a teacher's or a generator's -> Teacher. Raises ValueError,
    FileNotFoundError."""
    kind = state.get('kind', 'ours')
    net = build(NETWORKS.get(kind, MDM), state['args'], path)
    restore(net, state[weights], path, weights)
    tokenizer = unpack_tokenizer(state['tokenizer'], tokenizer_path, path)
    if kind in TEXT_KINDS:
        encoder = text_encoder(kind, text_path, net, device)
        return text_teacher(kind, net, tokenizer, encoder, state['prompts']['first'], state['data'], state['config'],
                            device)
    return word_teacher(kind, net, tokenizer, state['words'], state['prompts'], state['data'], state['config'], device)


def load_teacher(kind, path, tokenizer_path='', data='', n_head=0, device='cpu', text_path='', prompts='', grid=0,
                 any_prompts=False):
    """-> Teacher. kind 'ours' reads our model.pt at `path`. maskgit and maskbit are published
    weights (n_head heads, 0: as published) whose words are class numbers, or the names of the class
    folders if `data` is a folder (sorted, the published order). maskgen and meissonic read any text
    through the CLIP tower at `text_path`; they train on the lines of the file `prompts`, or on the
    captions of the folder `data`; `grid` tokens a side (Meissonic, 0: as published). Path 'random'
    takes random weights. Raises ValueError, FileNotFoundError with one line."""
    folder = '' if data in WORLDS else data
    if kind == 'ours':
        state = load_checkpoint(path, 'model', 'Train it with: python model.py, or say where it is: --teacher_ckpt=FILE',
                                fallback=True)
        if data in WORLDS and data != state['data']:
            raise ValueError(f'{path} was trained on {state["data"]}, not on {data}; leave --data out, or give each '
                             'data set a folder of its own with --out_dir')
        state['data'] = data or state['data']                  # a folder may have moved
        loaded = unpack(state, device, path=path)
        check_origin(path, state, dict(data=loaded.source.digest()))
        note_unfinished(state, path)
        return loaded
    net, tokenizer = published_pair(kind, path, tokenizer_path, n_head, grid)
    if kind in TEXT_KINDS:
        if not text_path and path in RANDOM:
            text_path = path
        encoder = text_encoder(kind, text_path, net, device)
        found = training_prompts(prompts, folder, tokenizer, encoder, any_prompts)
        return text_teacher(kind, net, tokenizer, encoder, found, folder, {}, device)
    words = [str(k) for k in range(net.n_words)]
    if folder:
        words = list(open_data(folder, tokenizer.config['image_size']).words)
    if len(words) != net.n_words:
        raise ValueError(f'--data={folder} has {len(words)} class folders, {path} knows {net.n_words} classes')
    labels = torch.arange(net.n_words)[:, None]
    return word_teacher(kind, net, tokenizer, words, labels, folder, {}, device)


def text_encoder(kind, path, net, device):
    """The CLIP text tower of a kind; 'random' stands in for it where a published size is timed.
    Raises ValueError."""
    if path in RANDOM:
        return RandomText(*net.null_words.shape[1:], net.null_pooled.shape[1], device)
    if not path or os.path.isfile(path):
        raise ValueError(f'--teacher={kind} reads text: give its CLIP text encoder with --text_path=FOLDER (weights and '
                         'word files; see README.md)')
    return load_text_encoder(path, ACTIVATIONS[kind], device=device)


def training_prompts(path, folder, tokenizer, encoder, any_prompts):
    """The prompts of stage 1: a file, or the captions of a folder; or, to time a published size or
    to draw a prompt of one's own (`any_prompts`), none that matter."""
    if path:
        return PromptFile(path)
    if folder:
        source = open_data(folder, tokenizer.config['image_size'])
        return source.captions(range(source.length))
    if any_prompts or isinstance(encoder, RandomText):
        return [f'a picture of {k} things' for k in range(64)]
    raise ValueError('a teacher that reads text needs prompts to train on: give --prompts=FILE (.txt, a prompt a line; '
                     '.jsonl, .json, .csv), or --data=FOLDER of captioned images')


def published_pair(kind, path, tokenizer_path, n_head, grid=0):
    """A published network and its tokenizer, which must be of one release."""
    if path in RANDOM and not tokenizer_path:
        tokenizer_path = 'random'
    if not path or not tokenizer_path:
        raise ValueError(f'--teacher={kind} needs --teacher_path=FILE and --tokenizer_path=FILE; README.md says where '
                         'to get them, and --teacher_path=random takes random weights of the published size')
    if kind in TEXT_KINDS:
        net, tokenizer = text_pair(kind, path, tokenizer_path, n_head, grid)
    else:
        net, tokenizer = class_pair(kind, path, tokenizer_path, n_head)
    if (net.N, net.V) != (tokenizer.N, tokenizer.V):
        raise ValueError(f'{path} has {net.N} tokens of {net.V} codes, {tokenizer_path} {tokenizer.N} of '
                         f'{tokenizer.V}: they are not of one release')
    return net, tokenizer


def class_pair(kind, path, tokenizer_path, n_head):
    """Network and tokenizer of MaskGIT, whose V only the tokenizer tells, or of MaskBit; the grid of
    an image and MaskBit's S only the network tells, so a tokenizer of other ones is read again."""
    tokenizer = Tokenizer.from_pretrained(kind, tokenizer_path)
    net = MDM.from_pretrained(kind, path, n_head, tokenizer.V)
    grid, S = math.isqrt(net.L), net.config['S']
    if (tokenizer.grid, tokenizer.config['S']) != (grid, S):
        tokenizer = Tokenizer.from_pretrained(kind, tokenizer_path, grid, S)
    return net, tokenizer


def text_pair(kind, path, tokenizer_path, n_head, grid):
    """Network and tokenizer of MaskGen, whose V only the tokenizer tells, or of Meissonic, whose
    grid only the user or the halving inside tells."""
    if kind == 'maskgen':
        tokenizer = Tokenizer.from_pretrained(kind, tokenizer_path)
        V = None if path in RANDOM else tokenizer.V
        return MDM.from_pretrained(kind, path, n_head, V), tokenizer
    net = MDM.from_pretrained(kind, path, n_head, grid=grid)
    return net, Tokenizer.from_pretrained(kind, tokenizer_path, math.isqrt(net.N))


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


def packed_digest(saved):
    """The digest of a tokenizer as `pack` stores it: a published one's is beside its path."""
    return saved['digest'] if 'kind' in saved else hash_of_weights(saved['net'])


def same_origin(loaded, state, path):
    """Raise ValueError unless a teacher and the checkpoint of a stage speak of the same tokens and
    words, and of the same prompts where these come from a file; a note where another teacher, or
    one of other images, made it."""
    origin = dict(state.get('origin', {}), tokenizer=packed_digest(state['tokenizer']))
    check_origin(path, dict(origin=origin), loaded.origin)
    if isinstance(state.get('prompts'), dict):             # those of a file
        same_prompts(loaded.packed_prompts, state['prompts'])


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
    interrupted. data '' is what the one that is there was trained on, else the shapes world. Raises
    ValueError for other data, and where the tokenizer there is not the teacher's."""
    tokenizer = saved_stage('tokenizer', data, folder)
    made = saved_stage('model', data, folder)
    if is_done(made):
        if tokenizer:
            present = dict(tokenizer=packed_digest(tokenizer))
            check_origin(os.path.join(folder, 'model.pt'), made, present)
        return
    for script, minutes in (('tokenizer', 3), ('model', 4)):
        state = saved_stage(script, data, folder)
        if state:
            data = state['config']['data']
        if is_done(state):
            continue
        path = os.path.join(folder, f'{script}.pt')
        print(f'{path} is {"unfinished" if state else "missing"}: running {script}.py first, expected '
              f'{minutes} minutes on 2 CPU cores', flush=True)
        settings = dict(data=data or 'shapes', seed=seed)
        if state:
            settings = {**state['config'], 'resume': True}
        stopped = run_script(script, {**settings, 'out_dir': folder})
        state = saved_stage(script, data, folder)
        if stopped or not is_done(state):
            hint = '; the same command continues it' if state else ''
            raise ValueError(f'{script}.py did not finish (see above){hint}')


def saved_stage(script, data, folder):
    """The checkpoint of tokenizer.py or model.py in `folder`, None if there is none. ValueError for
    other data than `data`, where that is not ''."""
    path = os.path.join(folder, f'{script}.pt')
    if not exists(path):
        return None
    state = load_checkpoint(path, script, 'Delete it to train it again.', fallback=True)
    made_for = state['config']['data']
    moved = made_for not in WORLDS and not os.path.exists(made_for)
    if data not in ('', made_for) and not moved:
        raise ValueError(f'{path} was trained on {printable(made_for)}, not on {data}; give each data set a folder '
                         f'of its own, --out_dir=out/{os.path.basename(data)}, or, if the same images have only moved: '
                         f'--teacher_ckpt={folder}/model.pt')
    return state


def is_done(state):
    return state is not None and state['step'] >= state['config']['steps']


def run_script(script, settings):
    """Run model.py or tokenizer.py as one process of its own, with the settings that are not its
    defaults -> was there a wish to stop? It is passed on, and the script saves."""
    command = [sys.executable, os.path.join(HERE, f'{script}.py')]
    defaults = vars(sys.modules[script])
    command += [f'--{key}={value}' for key, value in settings.items() if value != defaults.get(key)]
    single = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    child = subprocess.Popen(command, env=single)
    asked = []

    def pass_on(number, frame):
        asked.append(number)
        child.terminate()                                      # it saves and ends, and so do we
    before = on_stop_signals(pass_on)
    child.wait()
    for number, handler in before.items():
        signal.signal(number, handler)
    return bool(asked)


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


LANDMARKS = {'maskgit': ('tok_emb.weight',), 'maskbit': ('prediction_layer.weight',)}


def published_name(key, kind):
    """Our parameter name of a transformer -> the name in the published file."""
    for ours, maskgit, maskbit in NAMES:
        theirs = maskgit if kind == 'maskgit' else maskbit
        found = re.match(ours.replace('.', r'\.').replace('{}', r'(\d+)'), key)
        if found and theirs:
            return theirs.format(*found.groups()) + key[found.end():]
    return key                                                 # tok_emb, input_proj, pos_emb, bias, codes


def published_transformer(kind, path, n_head=None, V=None, grid=0, axes=None):
    """`MDM.from_pretrained`. MaskGIT keeps V codes and K classes in one table; unless given, V is
    the power of two >= 128 that leaves K = 1000, or else the largest that fits."""
    check_kind(kind)
    if kind == 'maskgen':
        return published_maskgen(path, n_head, V)
    if kind == 'meissonic':
        return published_meissonic(path, n_head, grid, axes)
    if path == 'random':
        return seeded(MDM, TRANSFORMERS[kind])
    weights, name = read_published(path, landmarks=LANDMARKS[kind])
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
        raise ValueError(f'unknown kind {printable(repr(kind))}; supported: {", ".join(KINDS)}')


# -----------------------------------------------------------------------------
# Published tokenizers

VQGAN = [('.mid.block.0.', '.mid.block_1.'), ('.mid.block.1.', '.mid.block_2.'), ('.mid.attn.0.', '.mid.attn_1.'),
         ('sample.', 'sample.conv.'), ('codebook', 'quantize.embedding')]
MOST_BITS = 16         # of a code; 2^16 codes are 500 times as many as any release has
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


def published_tokenizer(kind, path, grid=0, S=0, n_head=None):
    """`Tokenizer.from_pretrained`: all sizes are read off the shapes but the grid of an image,
    MaskBit's S and the heads of TA-TiTok, which the weights leave open (0, None: as released)."""
    check_kind(kind)
    if kind == 'maskgen':
        tokenizer = published_tatitok(path, n_head)
    elif kind == 'meissonic':
        tokenizer = published_meissonic_vq(path, grid or 64)
    elif path == 'random':
        tokenizer = seeded(Tokenizer, TOKENIZERS[kind])
    else:
        tokenizer = read_tokenizer(kind, path, grid or 16, S)
    if isinstance(path, (str, os.PathLike)):
        where = path if path == 'random' else os.path.abspath(path)
        tokenizer.source = dict(kind=kind, path=where, grid=tokenizer.grid, S=S, digest=tokenizer.digest())
        if kind == 'maskgen':
            tokenizer.source['n_head'] = tokenizer.config['n_head']
    return tokenizer.eval().requires_grad_(False)


def read_tokenizer(kind, path, grid, S):
    weights, name = read_published(path, landmarks=('encoder.conv_in.weight',))
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
        if 'quantize.embedding.weight' in weights:
            raise ValueError(f'{name}: quantize.embedding.weight is a learned codebook (vqgan_plus), which no released '
                             'generator reads; expected a maskbit tokenizer of bits, as in maskbit_tokenizer_14bit.bin')
        bits = size('encoder.conv_out.weight', 0, 0, 1, 1)[0]
        S = S or 1 + (bits % 2 == 0)                           # released: 2 codes per place
        if bits // S > MOST_BITS or bits % S:
            raise ValueError(f'{name}: encoder.conv_out.weight has {bits} rows, the bits of {S} codes, expected '
                             f'{S} to {S * MOST_BITS} of them in equal parts. Is this a tokenizer of bits?')
        mid = count_numbers(w, r'encoder\.mid\.res_blocks\.(\d+)\.')
        config |= dict(S=S, n_codes=2 ** (bits // S), code_dim=bits // S, mid=mid)
        w['codes'] = bit_rows(bits // S)
    with torch.device('meta'):
        tokenizer = Tokenizer(**config)

    def rename(key):
        return published_tokenizer_name(key, kind, depth)
    return fill(tokenizer, w, rename, name)
