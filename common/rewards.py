"""
Rewards: functions (images (B, 3, H, W) in [-1, 1], prompts) -> (B,), differentiable in the images.

In order: the interface; published rewards (CLIP score, HPSv2.1, PickScore, ImageReward); the
two-tower models of the small world; their training. A reward of your own is such a function and
two lines in `load_rewards`.
"""
import math
import os
from collections import OrderedDict
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.files import (build, check_weights, check_origin, digest_of, load_checkpoint,
                          open_hub, restore, save_checkpoint)
from common.images import encode_images, word_ids
from common.metrics import NoReference, Reference
from common.published import needed, read_published
from common.run import cosine_law, meet, progress, recompute, rng_for
from common.text import COMMON_WORDS, check_reads_text, tell_if_cut

# -----------------------------------------------------------------------------
# The interface

REWARDS = ('clip', 'clipscore', 'hps', 'pick', 'imagereward')  # a setting w_NAME each


def load_reward(name, settings, world_file, device):
    """The reward of that name -> function (images, prompts) -> (B,). Raises ValueError where a file
    or a package is missing, or does not fit."""
    recomputed = settings.get('grad_checkpoint', False)
    if name == 'clip':
        return world_reward(world_file, 'clip', device)
    if name == 'clipscore' and settings['clip_path'] == 'random':
        if not settings.get('bench'):
            raise ValueError('--clip_path=random is a stand-in to be timed; it goes with --bench')
        return random_reward(device, recomputed)
    if name == 'clipscore':
        return clip_reward('clipscore', settings['clip_path'], settings['clip_path'], device, recomputed)
    if name == 'hps':
        return clip_reward('hps', settings['hps_path'], settings['clip_path'], device, recomputed)
    if name == 'pick':
        return clip_reward('pick', settings['pick_path'], settings['clip_path'], device, recomputed)
    if name == 'imagereward':
        return image_reward(settings['imagereward_path'], settings['bert_path'], device, recomputed)
    raise ValueError(f'there is no reward {name!r}, expected one of {", ".join(REWARDS)}')


def load_rewards(settings, world_file, device):
    """The rewards whose weight is not zero: {name: (weight, function)}. Nothing is loaded for the
    others. Raises ValueError."""
    rewards = {}
    for name in REWARDS:
        weight = settings[f'w_{name}']
        if weight:
            rewards[name] = weight, load_reward(name, settings, world_file, device)
    return rewards


def load_held_out(settings, world_file, device):
    """The rewards that are only reported, {name: function}; the first of them may end a run: those
    that --held_out names, whose weight must be 0, or the small one. Raises ValueError."""
    names = [name for name in settings['held_out'].split(',') if name]
    if not names:
        return {'small': world_reward(world_file, 'held_out', device)}
    held_out = {}
    for name in names:
        if settings.get(f'w_{name}'):
            raise ValueError(f'--held_out={name} is optimised, too; a held-out reward has --w_{name}=0')
        held_out[name] = load_reward(name, settings, world_file, device)
    return held_out


def published_scores(settings, device):
    """The published rewards whose files are given, {name: function}: what a table reports. Raises
    ValueError."""
    scores = {}
    if (settings['hps_path'] or settings['pick_path']) and not settings['clip_path']:
        raise ValueError('HPSv2.1 and PickScore read their prompts with the words of CLIP ViT-H/14; '
                         'give its folder with --clip_path, too')
    if settings['clip_path']:
        scores['CLIP score'] = load_reward('clipscore', settings, '', device)
    for name, title in (('hps', 'HPSv2.1'), ('pick', 'PickScore'), ('imagereward', 'ImageReward')):
        if settings[f'{name}_path']:
            scores[title] = load_reward(name, settings, '', device)
    return scores


def published_in_use(s):
    """Which published rewards the settings `s` weigh or hold out, in words."""
    words = []
    for name in REWARDS[1:]:                                   # the first is the small one
        if vars(s)[f'w_{name}'] or name in s.held_out.split(','):
            words.append(f'--w_{name} or --held_out={name}')
    return words


@torch.no_grad()
def mean_scores(scores, images, captions, device):
    """{name: mean over the images} of rewards {name: function}."""
    sums = dict.fromkeys(scores, 0.0)
    for start in range(0, len(images), SCORED_AT_ONCE):
        part = images[start:start + SCORED_AT_ONCE].to(device)
        for name, score in scores.items():
            sums[name] += float(score(part, captions[start:start + SCORED_AT_ONCE]).sum())
    return {name: total / len(images) for name, total in sums.items()}


SCORED_AT_ONCE = 16


def needs_small_rewards(settings):
    """Are the two small models used, which are trained on the data?"""
    return bool(settings['w_clip'] or not settings['held_out'])


def reward_sum(rewards, images, prompts):
    """sum_i w_i R_i for rewards {name: (w_i, R_i)}: images (B, 3, H, W), prompts -> (B,)."""
    total = 0
    for weight, reward in rewards.values():
        total = total + weight * reward(images, prompts)
    return total


def cached(features):
    """Remember the text features of every prompt: features([prompt]) -> (1, ...) becomes a function
    prompts -> (B, ...). One prompt at a time, as the last bits of a matrix product depend on its
    batch, and a resumed run meets the prompts in another order."""
    known = {}

    @torch.no_grad()
    def look_up(prompts):
        for prompt in prompts:
            if prompt not in known:
                known[prompt] = features([prompt])[0]
        return torch.stack([known[prompt] for prompt in prompts])
    return look_up


def frozen(network, device):
    """The network in float32 on the device, for use only."""
    return network.float().to(device).eval().requires_grad_(False)


# -----------------------------------------------------------------------------
# Published rewards: they need the package transformers

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)    # red, green, blue of its training images
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CLIP_SIZE = 224                                    # pixels


def pixels_224(images):
    """CLIP's preprocessing made differentiable: images (B, 3, H, W) in [-1, 1] -> (B, 3, 224, 224).
    In float32: shorter side to 224 by an antialiased bicubic (PIL's), centre crop, CLIP's mean and
    std. Clamped before and after the resizing, as bicubic overshoots."""
    x = (images.float() / 2 + 0.5).clamp(0, 1)
    shorter = min(x.shape[2:])
    height, width = [CLIP_SIZE * side // shorter for side in x.shape[2:]]
    x = F.interpolate(x, size=(height, width), mode='bicubic', antialias=True, align_corners=False)
    x = x.clamp(0, 1)
    top = (height - CLIP_SIZE) // 2
    left = (width - CLIP_SIZE) // 2
    x = x[:, :, top:top + CLIP_SIZE, left:left + CLIP_SIZE]
    mean = torch.tensor(CLIP_MEAN).to(x)[:, None, None]
    std = torch.tensor(CLIP_STD).to(x)[:, None, None]
    return (x - mean) / std


def hub(path):
    """`with hub(path) as transformers:` surrounds the reading of a published reward."""
    return open_hub(path, 'published rewards', 'a published reward',
                    'say where its files are with --clip_path, --hps_path, --pick_path, '
                    '--imagereward_path, --bert_path')


def renamed(key, beginnings, parts):
    """A weight's name with another beginning, by the first row (old, new) of `beginnings` that
    fits, and with other parts, by every row of `parts`."""
    for old, new in beginnings:
        if key.startswith(old):
            key = new + key[len(old):]
            break
    for old, new in parts:
        key = key.replace(old, new)
    return key


OPEN_CLIP = (    # names begin so in open_clip | in transformers.CLIPModel
    ('visual.class_embedding',        'vision_model.embeddings.class_embedding'),
    ('visual.positional_embedding',   'vision_model.embeddings.position_embedding.weight'),
    ('visual.conv1.',                 'vision_model.embeddings.patch_embedding.'),
    ('visual.ln_pre.',                'vision_model.pre_layrnorm.'),    # spelled like this
    ('visual.transformer.resblocks.', 'vision_model.encoder.layers.'),
    ('visual.ln_post.',               'vision_model.post_layernorm.'),
    ('token_embedding.',              'text_model.embeddings.token_embedding.'),
    ('positional_embedding',          'text_model.embeddings.position_embedding.weight'),
    ('transformer.resblocks.',        'text_model.encoder.layers.'),
    ('ln_final.',                     'text_model.final_layer_norm.'),
)
OPEN_CLIP_BLOCK = (    # inside a block of either transformer
    ('.ln_1.',       '.layer_norm1.'),
    ('.attn.',       '.self_attn.'),
    ('.ln_2.',       '.layer_norm2.'),
    ('.mlp.c_fc.',   '.mlp.fc1.'),
    ('.mlp.c_proj.', '.mlp.fc2.'),
)


def from_open_clip(state):
    """Weights by open_clip's names -> by the names of transformers.CLIPModel. In open_clip queries,
    keys and values are one matrix, and both projections are transposed. Raises KeyError where these
    are missing."""
    out = {}
    out['visual_projection.weight'] = state['visual.proj'].T
    out['text_projection.weight'] = state['text_projection'].T
    for key, value in state.items():
        if key in ('visual.proj', 'text_projection'):
            continue
        name = renamed(key, OPEN_CLIP, OPEN_CLIP_BLOCK)
        if '.in_proj_' in name:
            for letter, part in zip('qkv', value.chunk(3)):
                out[name.replace('in_proj_', f'{letter}_proj.')] = part
        else:
            out[name] = value
    return out


def word_reader(words, length, rows, path):
    """The ids and the attention mask of prompts, filled up or cut to `length`, by a word tokenizer
    -> function prompts -> ids (B, length), mask. Raises ValueError unless it reads its prompts, and
    the text tower has as many `rows` of words: transformers invents a tokenizer where files lack. Of
    the first prompt that is cut a note tells."""
    cut = ['our own']                                      # the checks below are silent

    def read(prompts):
        pieces = words(prompts, padding='max_length', truncation=True, max_length=length,
                       return_tensors='pt')
        for prompt, mask in zip(prompts, pieces['attention_mask']):
            if mask.all() and not cut and tell_if_cut(words, prompt, length, f'the reward {path}'):
                cut.append(prompt)
        return pieces['input_ids'], pieces['attention_mask']

    def ids_of(prompts):
        return read(prompts)[0]
    try:
        check_reads_text(ids_of)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    largest = int(ids_of([' '.join(COMMON_WORDS)]).max())
    if largest >= rows:
        raise ValueError(f'{path}: its word tokenizer gives the id {largest}, and the text tower has '
                         f'{rows}; they are not of one release')
    cut.clear()
    return read


def load_clip(path, clip_path):
    """A CLIPModel and its word tokenizer from a hub id or local folder. Raises ValueError."""
    with hub(path) as transformers:
        model, report = transformers.CLIPModel.from_pretrained(
            path, use_safetensors=True, output_loading_info=True)
        missing = sorted(report['missing_keys'])    # these would stay random
        if missing:
            raise KeyError(missing[0])
        words = transformers.AutoTokenizer.from_pretrained(clip_path)
    check_weights(model, path)
    return model, words


def load_hps(path, clip_path):
    """The CLIPModel of an HPS file, whose names are open_clip's, and its word tokenizer. Sizes and
    words are those of clip_path. Raises ValueError."""
    with hub(path) as transformers:
        config = transformers.CLIPConfig.from_pretrained(clip_path)
        model = transformers.CLIPModel(config)
        state = from_open_clip(read_published(path, landmarks=('visual.proj',))[0])
        words = transformers.AutoTokenizer.from_pretrained(clip_path)
    restore(model, needed(model, state, path), path, 'HPSv2.1')
    return model, words


def unit_features(found):
    """CLIP features of length 1, (B, d). From version 5 on transformers wraps them in an object."""
    features = getattr(found, 'pooler_output', found)
    return F.normalize(features, dim=-1)


def clip_reward(kind, path, clip_path, device, recomputed=False):
    """CLIP ViT-H/14 in three sets of weights, f and g unit vectors of image and prompt. Kind
    clipscore: CLIP score 100 f.g; hps: HPSv2.1 f.g (arXiv 2306.09341); pick: PickScore
    exp(logit_scale) f.g (arXiv 2305.01569). `path` holds the weights, `clip_path` the word
    tokenizer; `recomputed`, see `recompute`. Raises ValueError."""
    if kind == 'hps':
        model, words = load_hps(path, clip_path)
    else:
        model, words = load_clip(path, clip_path)
    model = frozen(model, device)
    length = model.config.text_config.max_position_embeddings
    scales = {'clipscore': 100.0, 'hps': 1.0, 'pick': model.logit_scale.exp().item()}
    scale = scales[kind]
    if recomputed:
        recompute(model.vision_model.encoder.layers)
    read = word_reader(words, length, model.config.text_config.vocab_size, clip_path)

    def text_features(prompts):
        ids = read(prompts)[0].to(device)                          # (B, length)
        return unit_features(model.get_text_features(input_ids=ids))

    known_features = cached(text_features)
    first, second = known_features([' '.join(COMMON_WORDS[:5]), ' '.join(COMMON_WORDS[5:])])
    if torch.equal(first, second):                                 # as where no end token is found
        raise ValueError(f'{clip_path}: the text tower of {path} says the same of two prompts; are '
                         'tower and word tokenizer of one release?')

    def score(images, prompts):
        pixels = pixels_224(images)
        f = unit_features(model.get_image_features(pixel_values=pixels))
        g = known_features(prompts)
        return scale * (f * g).sum(-1)
    return score


STAND_IN = dict(width=1280, depth=32, n_head=16, patch=14)     # the image tower of CLIP ViT-H/14


def random_reward(device, recomputed):
    """A stand-in of the size of CLIP ViT-H/14 with random weights, without text: to time a run and to
    see its memory."""
    width, patch = STAND_IN['width'], STAND_IN['patch']
    blocks = nn.ModuleList()
    for _ in range(STAND_IN['depth']):
        blocks.append(nn.TransformerEncoderLayer(width, STAND_IN['n_head'], 4 * width, dropout=0.0,
                                                 activation='gelu', batch_first=True, norm_first=True))
    tower = nn.ModuleDict(dict(patches=nn.Conv2d(3, width, patch, patch), blocks=blocks))
    tower = frozen(tower, device)
    if recomputed:
        recompute(tower.blocks)

    def score(images, prompts):
        states = tower.patches(pixels_224(images)).flatten(2).transpose(1, 2)      # (B, 256, width)
        for block in tower.blocks:
            states = block(states)
        return F.normalize(states.mean(1), dim=-1)[:, 0]
    return score


IMAGEREWARD = (    # names begin so in ImageReward.pt | in our ModuleDict
    ('blip.visual_encoder.cls_token',         'visual.embeddings.class_embedding'),
    ('blip.visual_encoder.pos_embed',         'visual.embeddings.position_embedding'),
    ('blip.visual_encoder.patch_embed.proj.', 'visual.embeddings.patch_embedding.'),
    ('blip.visual_encoder.blocks.',           'visual.encoder.layers.'),
    ('blip.visual_encoder.norm.',             'visual.post_layernorm.'),
    ('blip.text_encoder.',                    'text.'),
    ('mlp.layers.',                           'mlp.'),
)
IMAGEREWARD_BLOCK = (    # inside a block of its vision transformer
    ('.norm1.',     '.layer_norm1.'),
    ('.attn.qkv.',  '.self_attn.qkv.'),
    ('.attn.proj.', '.self_attn.projection.'),
    ('.norm2.',     '.layer_norm2.'),
)
IMAGEREWARD_UNUSED = (    # two projections of BLIP, and a buffer that only counts
    'blip.vision_proj',
    'blip.text_proj',
    'blip.text_encoder.embeddings.position_ids',
)
IMAGEREWARD_MLP = ('0', '2', '4', '6', '7')    # its linear layers; 1, 3 and 5 are dropout
IMAGEREWARD_MEAN = 0.16717362830052426         # of its raw scores, from its source code
IMAGEREWARD_STD = 1.0333394966054072
IMAGEREWARD_WORDS = 35                         # word pieces to which a prompt is cut or filled up


def from_imagereward(state):
    """Weights by the names of ImageReward.pt -> by the names of `imagereward_network`."""
    out = {}
    for key, value in state.items():
        if not key.startswith(IMAGEREWARD_UNUSED):
            out[renamed(key, IMAGEREWARD, IMAGEREWARD_BLOCK)] = value
    return out


def count_layers(state, prefix):
    """How many layers there are in a state dict whose names read prefix0..., prefix1..., ..."""
    last = 0
    for key in state:
        if key.startswith(prefix):
            number = key[len(prefix):].split('.')[0]
            last = max(last, int(number))
    return last + 1


def blip_vision(transformers, state):
    """ImageReward's vision transformer, with sizes read off its weights. Raises KeyError."""
    config = transformers.BlipVisionConfig(
        hidden_size=state['visual.post_layernorm.weight'].shape[0],
        intermediate_size=state['visual.encoder.layers.0.mlp.fc1.weight'].shape[0],
        image_size=CLIP_SIZE,
        patch_size=state['visual.embeddings.patch_embedding.weight'].shape[2],
        num_hidden_layers=count_layers(state, 'visual.encoder.layers.'),
        num_attention_heads=16,
        layer_norm_eps=1e-6,
        hidden_act='gelu')
    return transformers.BlipVisionModel(config)


def blip_text(transformers, state):
    """ImageReward's BERT with cross-attention to the image, with sizes read off its weights.
    Raises KeyError."""
    vocabulary, width = state['text.embeddings.word_embeddings.weight'].shape
    config = transformers.BlipTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=state['text.encoder.layer.0.intermediate.dense.weight'].shape[0],
        encoder_hidden_size=state['visual.post_layernorm.weight'].shape[0],
        max_position_embeddings=state['text.embeddings.position_embeddings.weight'].shape[0],
        num_hidden_layers=count_layers(state, 'text.encoder.layer.'),
        num_attention_heads=12,
        layer_norm_eps=1e-12)
    return transformers.BlipTextModel(config, add_pooling_layer=False)


def imagereward_network(transformers, state):
    """The three parts of ImageReward with random weights: visual, text, mlp. Raises KeyError."""
    visual = blip_vision(transformers, state)
    text = blip_text(transformers, state)
    layers = OrderedDict()
    for number in IMAGEREWARD_MLP:
        outputs, inputs = state[f'mlp.{number}.weight'].shape
        layers[number] = nn.Linear(inputs, outputs)
    return nn.ModuleDict({'visual': visual, 'text': text, 'mlp': nn.Sequential(layers)})


def image_reward(path, bert_path, device, recomputed=False):
    """ImageReward (arXiv 2304.05977): BERT whose words look at BLIP's image tokens, and a linear
    map of its first state (five layers without activations). Words and pixels meet in every layer,
    so there are no text features to remember. Raises ValueError."""
    with hub(path) as transformers:
        weights = read_published(path, landmarks=('blip.visual_encoder.cls_token',))[0]
        state = from_imagereward(weights)
        network = imagereward_network(transformers, state)
        words = transformers.AutoTokenizer.from_pretrained(bert_path)
    restore(network, needed(network, state, path), path, 'ImageReward')
    network = frozen(network, device)
    if recomputed:
        recompute([*network.visual.encoder.layers, *network.text.encoder.layer])
    read_words = word_reader(words, IMAGEREWARD_WORDS, network.text.config.vocab_size, bert_path)

    def score(images, prompts):
        pixels = pixels_224(images)
        seen = network.visual(pixel_values=pixels).last_hidden_state    # (B, 197, width)
        ids, mask = read_words(prompts)
        read = network.text(ids.to(device), attention_mask=mask.to(device),
                            encoder_hidden_states=seen, is_decoder=False)
        first_state = read.last_hidden_state[:, 0]                      # (B, width of the text)
        raw = network.mlp(first_state)[:, 0]                            # (B,)
        return (raw - IMAGEREWARD_MEAN) / IMAGEREWARD_STD
    return score


# -----------------------------------------------------------------------------
# The small two-tower models

def conv_layer(c_in, c_out, size, stride):
    """Convolution, group norm, SiLU: (B, c_in, H, W) -> (B, c_out, H / stride, W / stride)."""
    convolution = nn.Conv2d(c_in, c_out, size, stride, padding=size // 2)
    return nn.Sequential(convolution, nn.GroupNorm(8, c_out), nn.SiLU())


def conv_tower(d):
    """Images (B, 3, 32, 32) -> (B, d), four convolutions: the reward that is optimised."""
    return nn.Sequential(
        conv_layer(3, 32, 5, 2),      # (B, 32, 16, 16)
        conv_layer(32, 64, 3, 2),     # (B, 64, 8, 8)
        conv_layer(64, 64, 3, 1),
        conv_layer(64, 128, 3, 2),    # (B, 128, 4, 4)
        nn.Flatten(),
        nn.Linear(128 * 4 * 4, d))


class PatchTower(nn.Module):
    """Images (B, 3, 32, 32) -> (B, d), a small vision transformer: the reward that is only
    reported."""

    def __init__(self, d):
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 4, stride=4)
        self.place = nn.Parameter(0.02 * torch.randn(1, 64, 64))
        layers = [nn.TransformerEncoderLayer(64, 2, 128, dropout=0.0, activation='gelu',
                                             batch_first=True, norm_first=True) for _ in range(2)]
        self.blocks = nn.Sequential(*layers)
        self.out = nn.Linear(64 * 64, d)

    def forward(self, x):
        patches = self.patches(x).flatten(2).transpose(1, 2)    # (B, 64 patches, 64 numbers)
        states = self.blocks(patches + self.place)
        return self.out(states.flatten(1))


class TwoTower(nn.Module):
    """CLIP in miniature: log-odds that a caption is true of an image = scale cos(f, g) + shift,
    with f from pixels and g from the caption's words in order. `kind` conv or patch is the image
    tower."""

    def __init__(self, kind, n_words, T, d=256):
        super().__init__()
        self.config = dict(kind=kind, n_words=n_words, T=T, d=d)
        if kind == 'conv':
            self.image = conv_tower(d)
        else:
            self.image = PatchTower(d)
        self.words = nn.Embedding(n_words + 1, 32)       # the last row is "no word"
        self.text = nn.Sequential(
            nn.Flatten(),                                # (B, T, 32) -> (B, 32 T)
            nn.Linear(32 * T, 2 * d),
            nn.GELU(),
            nn.Linear(2 * d, d))
        self.log_scale = nn.Parameter(torch.tensor(3.0))
        self.shift = nn.Parameter(torch.tensor(-8.0))    # at first hardly any caption is true

    def image_features(self, x):
        """Images (B, 3, H, W), H = W a multiple of 32 -> unit vectors (B, d)."""
        small = F.adaptive_avg_pool2d(x, 32)
        return F.normalize(self.image(small), dim=-1)

    def text_features(self, ids):
        """Word ids (B, T) -> unit vectors (B, d)."""
        return F.normalize(self.text(self.words(ids)), dim=-1)

    def score(self, f, g):
        """Unit vectors (..., d), (..., d) -> log-odds (...)."""
        return self.log_scale.exp() * (f * g).sum(-1) + self.shift


def world_reward(path, name, device):
    """R = log P(caption is true of the image), at most 0: an image that already follows its prompt
    pulls little. `name` is the model in the file, clip or held_out. Raises ValueError."""
    state = load_checkpoint(path, 'rewards', 'Make it with: python reward.py', fallback=True)
    net = frozen(build(TwoTower, state['args'][name], path), device)
    restore(net, state[name], path, name)

    def text_features(prompts):
        ids = word_ids(prompts, state['words'], net.config['T'])    # (B, T)
        return net.text_features(ids.to(device))

    known_features = cached(text_features)

    def score(images, prompts):
        f = net.image_features(images.clamp(-1, 1))
        g = known_features(prompts)
        return F.logsigmoid(net.score(f, g))
    return score


# -----------------------------------------------------------------------------
# Their training

RIGHT = 0.15     # largest `damage` of an image that counts as right: nine in ten reconstructions lie
                 # below .14, and the checker accepts 99 % up to .15
BROKEN = 0.3     # above, an image counts as wrong: the checker accepts a quarter
WARMUP = 50      # steps over which the learning rate rises


def random_span(size, start, side):
    """Two uniform numbers (B, 1) -> bool (B, side), True on an interval of 1 to side places."""
    length = 1 + (size * side).long().clamp(max=side - 1)
    first = (start * (side - length + 1)).long()
    at = torch.arange(side)
    return (at >= first) & (at < first + length)


def mixed(ids, other, V, rng):
    """Token probabilities (B, N, V) between two sets of images, ids (B, N): inside a random box, at
    random positions, each pair with a weight of its own. What a one-step generator gets wrong looks
    like this."""
    B, N = ids.shape
    side = math.isqrt(N)
    n_rows, n_columns = (side, side) if side * side == N else (1, N)       # tokens without a grid: a line
    u = torch.rand(B, 6, 1, generator=rng)
    height, top, width, left, density, strength = u.unbind(1)       # (B, 1) each
    rows = random_span(height, top, n_rows)
    columns = random_span(width, left, n_columns)
    box = (rows[:, :, None] & columns[:, None, :]).flatten(1)       # (B, N)
    inside = box & (torch.rand(B, N, generator=rng) < 0.2 + 0.8 * density)
    weight = (1.3 * strength).clamp(max=1) * inside                 # (B, N), 1 for 3 of 13 images
    one_hot = F.one_hot(ids, V).float()                             # (B, N, V)
    other_one_hot = F.one_hot(other, V).float()
    return torch.lerp(one_hot, other_one_hot, weight[..., None].to(ids.device))


def damage(x, y):
    """How far images x are from y where they differ most, (B,): the largest mean of |x - y| over
    4 x 4 pixels."""
    difference = (x - y).abs().mean(1, keepdim=True)                # (B, 1, H, W)
    patches = F.avg_pool2d(difference, kernel_size=4, stride=2)
    return patches.flatten(1).max(1).values


def reward_examples(source, tokenizer, words, T):
    """What the rewards learn from, in memory: images (n, 3, H, W), captions, their word ids (n, T),
    tokens (n, N) on the tokenizer's device, and `where`, {caption: indices of its images}."""
    n = min(10_000, source.length, 2 ** 27 // source.size ** 2)     # so many pixels are 1.6 GB
    images, captions = source.batch(source.training_examples(n))
    tokens = encode_images(tokenizer, images)
    ids = word_ids(captions, words, T)
    where = {}
    for i, caption in enumerate(captions):
        where.setdefault(caption, []).append(i)
    return SimpleNamespace(source=source, words=words, images=images, captions=captions, ids=ids,
                           tokens=tokens, where=where)


def wrong_captions(source, captions, u):
    """B captions, uniform numbers u (B, n_wrong, 3) -> B lists of n_wrong captions that are not true
    of the image."""
    rows = []
    for caption, numbers in zip(captions, u.tolist()):
        rows.append([source.wrong_caption(caption, number) for number in numbers])
    return rows


def choose_partners(examples, own, false, u):
    """A second image for each of the images `own` (B,) -> indices (B,). By u (B, 2): half of the time
    one of the same caption, else one of the wrong caption in `false` or, where no image has that
    caption, the image before in the batch."""
    u_caption, u_image = u.unbind(1)
    same_caption = u_caption < 0.5
    before = own.roll(1).tolist()
    partners = []
    for b, i in enumerate(own.tolist()):
        if same_caption[b]:
            choice = examples.where[examples.captions[i]]
        else:
            choice = examples.where.get(false[b], [before[b]])
        partners.append(choice[int(u_image[b] * len(choice))])
    return torch.tensor(partners)


def decode_mixed(examples, own, partners, tokenizer, rng):
    """Images (B, 3, H, W) in [-1, 1], decoded from the tokens of the images `own` mixed with those
    of `partners`."""
    captions = [examples.captions[i] for i in own.tolist()]
    probs = mixed(examples.tokens[own], examples.tokens[partners], tokenizer.V, rng)
    return tokenizer.decode(probs, captions).clamp(-1, 1)


def least_damage(images, examples, own, partners):
    """`damage` (B,) of images that should show what the images `own` show: to that image or, where
    the partner has the same caption, to the nearer of the two."""
    pairs = zip(own.tolist(), partners.tolist())
    alike = torch.tensor([examples.captions[i] == examples.captions[j] for i, j in pairs])
    second = torch.where(alike, partners, own)
    to_own = damage(images, examples.images[own].to(images.device))
    to_second = damage(images, examples.images[second].to(images.device))
    return torch.minimum(to_own, to_second)


def add_pixel_noise(images, rng):
    """Images plus noise, whose standard deviation is uniform in [0, 0.1] for each."""
    strength = 0.1 * torch.rand(len(images), 1, 1, 1, generator=rng)
    noise = strength * torch.randn(images.shape, generator=rng)
    return images + noise.to(images.device)


@torch.no_grad()
def build_batch(examples, tokenizer, rng, device, settings):
    """One batch: images (B, 3, H, W), of which the second half is decoded from mixed tokens; word
    ids (B, T) of their captions and (B, n_wrong, T) of wrong ones; harm (B,), their `damage`."""
    B = settings['reward_batch']
    own = torch.randint(len(examples.images), (B,), generator=rng)
    u_wrong = torch.rand(B, settings['n_wrong'], 3, generator=rng)
    u_partner = torch.rand(B, 2, generator=rng)
    captions = [examples.captions[i] for i in own.tolist()]
    false = wrong_captions(examples.source, captions, u_wrong)
    partners = choose_partners(examples, own, [row[0] for row in false], u_partner)

    half = B // 2
    images = examples.images[own].to(device)
    images[half:] = decode_mixed(examples, own[half:], partners[half:], tokenizer, rng)
    harm = least_damage(images, examples, own, partners)
    noisy = add_pixel_noise(images, rng)

    T = examples.ids.shape[1]
    false_ids = torch.stack([word_ids(row, examples.words, T) for row in false])
    return SimpleNamespace(images=noisy, ids=examples.ids[own].to(device),
                           false_ids=false_ids.to(device), harm=harm)


def contrastive_loss(net, batch):
    """Tell the true caption from the wrong ones and the batch's (CLIP), with log-odds that mean
    something by themselves (SigLIP, arXiv 2303.15343). An image's own caption counts as true up to
    the damage RIGHT, as false above BROKEN, and not at all in between."""
    B, n_wrong, T = batch.false_ids.shape
    f = net.image_features(batch.images)                            # (B, d)
    g = net.text_features(batch.ids)                                # (B, d)
    g_false = net.text_features(batch.false_ids.view(B * n_wrong, T))
    g_false = g_false.view(B, n_wrong, -1)                          # (B, n_wrong, d)
    same = (batch.ids[:, None] == batch.ids).all(-1)                # (B, B), the diagonal too
    s_true = net.score(f, g)                                        # (B,)
    s_false = net.score(f[:, None], g_false)                        # (B, n_wrong)
    s_other = net.score(f[:, None], g).masked_fill(same, -1e9)      # (B, B), image by caption

    right = (batch.harm <= RIGHT).float()
    broken = (batch.harm > BROKEN).float()
    scores = torch.cat([s_true[:, None], s_false, s_other], 1)      # (B, 1 + n_wrong + B)
    contrast = scores.logsumexp(1) - s_true                         # -log softmax, true caption
    if_right = (contrast + F.softplus(-s_true)) * right
    if_broken = 2 * F.softplus(s_true) * broken
    loss_true = (if_right + if_broken).mean()
    loss_false = F.softplus(s_false).mean()
    s_before = s_other.roll(1, 1).diagonal()                        # (B,), caption of image b - 1
    loss_other = 0.5 * F.softplus(s_before).mean()
    return loss_true + loss_false + loss_other


def train_reward(kind, source, tokenizer, words, T, part, device, settings):
    """Train one two-tower model of this kind -> TwoTower. `words` and T are its vocabulary and the
    length of a caption, `part` numbers the model in the seeds, settings holds seed, reward_steps,
    reward_batch, reward_lr, n_wrong. Half of the images are decoded from tokens mixed with those of
    another image of the same caption (two modes at once), of a wrong one, or of any; they count as
    right, as wrong or not at all by the pixel damage that did. Raises ValueError where there is
    nothing to follow."""
    if len(words) < 2:
        raise ValueError(f'{source.data} has a single class, so there is nothing to follow; a reward '
                         'needs at least two class folders')
    torch.manual_seed(settings['seed'] + part)
    net = TwoTower(kind, len(words), T).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings['reward_lr'], betas=(0.9, 0.98),
                                  weight_decay=0.01)
    examples = reward_examples(source, tokenizer, words, T)
    bar = progress(settings['reward_steps'], f'reward model {kind}')
    for step in range(settings['reward_steps']):
        optimizer.param_groups[0]['lr'] = settings['reward_lr'] * cosine_law(step, settings['reward_steps'], warmup=50)
        rng = rng_for(settings['seed'], step, ('rewards', part))
        batch = build_batch(examples, tokenizer, rng, device, settings)
        loss = contrastive_loss(net, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        bar.update()
    bar.close()
    return net.requires_grad_(False)


SMALL_REWARDS = {'clip': 'conv', 'held_out': 'patch'}  # the optimised one, and the one that is only reported
REWARD_SETTINGS = ('seed', 'reward_steps', 'reward_batch', 'reward_lr', 'n_wrong')


def small_reward_origin(loaded):
    """What they are made from, for `check_origin`."""
    return dict(vocabulary=digest_of(list(loaded.source.words)), data=loaded.source.digest())


def make_rewards(path, loaded, settings, run):
    """Train the two small reward models, the optimised one and the held-out one, where `path` is
    missing; raise ValueError where it was made for something else. All processes must call this."""
    source = loaded.source
    words = list(source.words)
    origin = small_reward_origin(loaded)
    if run.rank == 0 and not os.path.exists(path):
        print(f'{path} is missing: training two small reward models, expected 2 minutes on 2 CPU cores')
        config = {key: settings[key] for key in REWARD_SETTINGS}
        state = dict(stage='rewards', step=settings['reward_steps'], config=config, words=words, origin=origin, args={})
        for part, (name, kind) in enumerate(SMALL_REWARDS.items()):
            net = train_reward(kind, source, loaded.tokenizer, words, source.caption_length, part, run.device, config)
            state['args'][name], state[name] = net.config, net.state_dict()
        save_checkpoint(path, state)
    meet()
    made = load_checkpoint(path, 'rewards', fallback=True)
    check_origin(path, made, origin)
    if made['step'] != settings['reward_steps']:
        raise ValueError(f'{path}: made in {made["step"]} steps, expected --reward_steps={settings["reward_steps"]}; '
                         'delete it, or choose another --out_dir')


JUDGED_AT_ONCE = 250    # images per pass of the reward models


class Judged:
    """A reference, and beside its metrics the rewards and two symptoms of reward hacking."""

    def __init__(self, reference, rewards, held_out, device):
        self.reference = reference
        self.rewards = rewards
        self.held_out = held_out                       # {name: function}
        self.device = device

    @classmethod
    def of(cls, loaded, folder, n):
        """With the rewards that were loaded beside a teacher."""
        reference = Reference.of(loaded, folder, n) or NoReference(loaded)
        return cls(reference, loaded.rewards, loaded.held_out, loaded.device)

    def prompts(self, n):
        return self.reference.prompts(n)

    @torch.no_grad()
    def judge(self, images, captions):
        """Images (B, 3, H, W) on the device, captions -> means: trained reward, held-out rewards
        (`held_out` is the first), share of clipped values, colour saturation (largest minus smallest
        channel, in [0, 1])."""
        x = images.clamp(-1, 1)
        saturation = (x.amax(1) - x.amin(1)).mean() / 2
        row = dict(reward=reward_sum(self.rewards, images, captions).mean())
        for k, (name, reward) in enumerate(self.held_out.items()):
            row[f'held_{name}' if k else 'held_out'] = reward(images, captions).mean()
        row.update(clipped=(images.abs() > 1).float().mean(), saturation=saturation)
        return row

    def measure(self, images, captions):
        """`Reference.measure` of images (n, 3, H, W), anywhere, and the means of `judge`."""
        sums = {}
        for start in range(0, len(images), JUDGED_AT_ONCE):
            part = images[start:start + JUDGED_AT_ONCE].to(self.device)
            means = self.judge(part, captions[start:start + JUDGED_AT_ONCE])
            for name, mean in means.items():
                sums[name] = sums.get(name, 0) + len(part) * mean
        row = self.reference.measure(images, captions)
        for name, total in sums.items():
            row[name] = float(total / len(images))
        return row
