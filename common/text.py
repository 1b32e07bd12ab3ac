"""
Text for the text-to-image teachers: captions -> features of a CLIP text tower; files of prompts.

In order: the tower, read from any layout in which it is published; its word tokenizer; the
encoder, which joins them; prompts from a file. Only prompts do without the package `transformers`.
"""
import csv
import json
import mmap
import operator
import os
import re
from array import array
from collections import OrderedDict

import numpy as np
import torch

from common.files import check_weights, file_digest, open_hub, printable
from common.images import one_line
from common.published import WEIGHT_FILES, fill, read_published, shape_of
from common.run import is_rank0, rng_for

ACTIVATIONS = ('quick_gelu', 'gelu')   # MaskGen's tower, ViT-L/14; Meissonic's, ViT-H/14
HEAD_WIDTH = 64                        # of all published towers


def hub(path):
    """`with hub(path) as transformers:` surrounds the reading of a tower."""
    place = path
    if is_hub_id(path):
        place = f'{path} (no such folder here, so the Hub was asked)'
    return open_hub(place, 'text-to-image teachers', 'a CLIP text tower',
                    'expected a folder or a hub id such as openai/clip-vit-large-patch14-336')


def is_hub_id(path):
    """A name like owner/name that is nothing on this disk, and no weight file either."""
    if isinstance(path, dict) or os.path.exists(path):
        return False
    path = os.fspath(path)
    is_name = re.fullmatch(r'[\w-][\w.-]*/[\w.-]+', path) is not None
    return is_name and not path.endswith(WEIGHT_FILES)


# -----------------------------------------------------------------------------
# The tower

NAMES = [  # in transformers, as parts of a name           in OpenAI's files and open_clip
    ('text_model.embeddings.token_embedding.',             'token_embedding.'),
    ('text_model.embeddings.position_embedding.weight',    'positional_embedding'),
    ('text_model.encoder.layers.',                         'transformer.resblocks.'),
    ('text_model.final_layer_norm.',                       'ln_final.'),
    ('text_projection.weight',                             'text_projection'),
    ('.layer_norm1.',                                      '.ln_1.'),
    ('.self_attn.',                                        '.attn.'),
    ('.layer_norm2.',                                      '.ln_2.'),
    ('.mlp.fc1.',                                          '.mlp.c_fc.'),
    ('.mlp.fc2.',                                          '.mlp.c_proj.'),
]
TOKENS = 'text_model.embeddings.token_embedding.weight'
POSITIONS = 'text_model.embeddings.position_embedding.weight'
FIRST_MLP = 'text_model.encoder.layers.0.mlp.fc1.weight'
PROJECTION = 'text_projection.weight'

NOT_TEXT = (  # what files of a whole CLIP hold beside the text tower: names begin so
    'visual.', 'vision_model.', 'visual_projection.', 'logit_scale', 'logit_bias',
    'input_resolution', 'context_length', 'vocab_size', 'attn_mask',
    'text_model.embeddings.position_ids',
)


def transformers_name(key):
    """The name of a weight in transformers, and in its files."""
    return key


def open_clip_name(key):
    """The name of a weight in transformers -> in OpenAI's files and open_clip."""
    for ours, theirs in NAMES:
        key = key.replace(ours, theirs)
    return key


def load_tower(path, activation, n_head=None):
    """CLIP's text tower, frozen, in float32 -> transformers.CLIPTextModelWithProjection. `path` is
    a folder, a weight file in the layout of transformers, OpenAI or open_clip, the dict that it
    holds, or a hub id (safetensors only). Sizes are read off the shapes. Activation and heads are
    those of the config.json in a folder or on the hub; elsewhere they are `activation`, quick_gelu
    or gelu, and n_head, a head per 64 columns unless given. Raises ValueError, FileNotFoundError.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f'a CLIP text tower has the activation {" or ".join(ACTIVATIONS)}, '
                         f'got {activation!r}')
    if is_hub_id(path):
        tower = tower_from_hub(path)
    else:
        tower = tower_from_weights(path, activation, n_head)
    if tower.config.hidden_act != activation and is_rank0():
        print(f'note: {path}: its config.json says {tower.config.hidden_act}, the published tower '
              f'of this teacher has {activation}; is it the right one?')
    return tower.eval().requires_grad_(False)


def tower_from_hub(path):
    with hub(path) as transformers:
        tower, report = transformers.CLIPTextModelWithProjection.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False, output_loading_info=True)
        missing = sorted(report['missing_keys'])           # these would stay random
        if missing:
            raise ValueError(f'it has no {missing[0]}')
    check_weights(tower, path)
    return tower.float()


def tower_from_weights(path, activation, n_head):
    """A tower from a folder, a file or a dict."""
    weights, name = read_published(path, 'text_encoder', (TOKENS, 'token_embedding.weight'))
    w = {}
    for key, value in weights.items():
        if not key.startswith(NOT_TEXT):
            w[key] = value
    rename = transformers_name
    if 'positional_embedding' in w:
        rename = open_clip_name
        split_open_clip(w, name)
    settings = tower_sizes(w, name, rename)
    settings.update(hidden_act=activation, eos_token_id=settings['vocab_size'] - 1)
    settings.update(folder_settings(path))
    width = settings['hidden_size']
    if n_head is None:
        n_head = settings.pop('num_attention_heads', width // HEAD_WIDTH)
    if n_head < 1 or width % n_head:
        raise ValueError(f'{name}: width {width} does not fall into {n_head} heads (published: one '
                         f'per {HEAD_WIDTH} columns); give n_head=..., or a config.json in its folder')
    settings['num_attention_heads'] = n_head
    with hub(name) as transformers:
        config = transformers.CLIPTextConfig(**settings)
        with torch.device('meta'):
            tower = transformers.CLIPTextModelWithProjection(config)
    fill(tower, w, rename, name)
    place = torch.arange(settings['max_position_embeddings'])
    tower.text_model.embeddings.position_ids = place[None]            # a buffer that no file holds
    return tower


def tower_sizes(w, name, rename):
    """The sizes of a tower, read off the shapes of its weights `w`, as settings of transformers."""
    def size(key, *wanted):
        return shape_of(w, name, 'a CLIP text tower', rename(key), *wanted)
    vocabulary, width = size(TOKENS, 0, 0)
    return dict(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=len(block_prefixes(w)),
                max_position_embeddings=size(POSITIONS, 0, width)[0],
                intermediate_size=size(FIRST_MLP, 0, width)[0],
                projection_dim=size(PROJECTION, 0, width)[0],
                layer_norm_eps=1e-5, bos_token_id=vocabulary - 2, pad_token_id=0)


def block_prefixes(w):
    """What the names of each block begin with, such as transformer.resblocks.11."""
    prefixes = set()
    for key in w:
        block = re.match(r'(text_model\.encoder\.layers|transformer\.resblocks)\.\d+\.', key)
        if block:
            prefixes.add(block[0])
    return sorted(prefixes)


def split_open_clip(w, name):
    """Change the weights `w` of open_clip where transformers has another form: queries, keys and
    values are one matrix there, and the projection is applied from the right."""
    _, width = shape_of(w, name, 'a CLIP text tower', 'positional_embedding', 0, 0)
    for prefix in block_prefixes(w):
        for end, columns in (('weight', (width,)), ('bias', ())):
            key = f'{prefix}attn.in_proj_{end}'
            shape_of(w, name, 'a CLIP text tower', key, 3 * width, *columns)
            queries, keys, values = w.pop(key).chunk(3)
            w[f'{prefix}attn.q_proj.{end}'] = queries
            w[f'{prefix}attn.k_proj.{end}'] = keys
            w[f'{prefix}attn.v_proj.{end}'] = values
    shape_of(w, name, 'a CLIP text tower', 'text_projection', width, 0)
    w['text_projection'] = w['text_projection'].T.contiguous()


def folder_settings(path):
    """What the config.json of a folder tells and weights do not; {} where none of a CLIP is there.
    """
    if isinstance(path, dict) or not os.path.isdir(path):
        return {}
    config_path = os.path.join(path, 'config.json')
    if not os.path.isfile(config_path):
        return {}
    with hub(path) as transformers:
        with open(config_path, encoding='utf-8') as file:
            kind = json.load(file).get('model_type')
        if kind not in ('clip', 'clip_text_model'):        # such as that of an image tower
            return {}
        config = transformers.CLIPTextConfig.from_pretrained(path)
    names = ('hidden_act', 'num_attention_heads', 'layer_norm_eps', 'eos_token_id')
    return {name: getattr(config, name) for name in names}


# -----------------------------------------------------------------------------
# Its word tokenizer

WORD_FILES = (('tokenizer.json',), ('vocab.json', 'merges.txt'))       # the one, or the other two

# Words that any tokenizer of captions knows, no two of the same letters.
COMMON_WORDS = ('a', 'red', 'green', 'blue', 'yellow', 'circle', 'square', 'two', 'above', 'left')


def load_words(path):
    """The transformers.CLIPTokenizer of a hub id, a folder, or the folder `tokenizer` in it or
    beside it (diffusers). Raises ValueError."""
    if is_hub_id(path):
        place = path
    else:
        place = word_folder(path)
    with hub(place) as transformers:
        return transformers.CLIPTokenizer.from_pretrained(place, trust_remote_code=False)


def word_folder(path):
    """The folder with the word files that belong to a tower. Raises ValueError: without these files
    transformers invents a tokenizer of two words."""
    if isinstance(path, dict):
        raise ValueError('weights from a dict have no word files; give the folder or hub id of the '
                         'word tokenizer')
    folder = os.path.abspath(path)
    if not os.path.isdir(folder):
        folder = os.path.dirname(folder)                   # of a single weight file
    beside = os.path.join(os.path.dirname(folder), 'tokenizer')
    for place in (folder, os.path.join(folder, 'tokenizer'), beside):
        for names in WORD_FILES:
            if all(os.path.isfile(os.path.join(place, name)) for name in names):
                return place
    raise ValueError(f'{path}: no word files of a CLIP tokenizer here, nor in {beside}: expected '
                     'vocab.json and merges.txt, or tokenizer.json, such as those of '
                     'openai/clip-vit-large-patch14')


def check_reads_text(encode_ids):
    """Prove that encode_ids(captions) -> rows of ids reads its captions: two prompts differ, and
    most common words have ids of their own. Raises ValueError. A tokenizer without its word files
    knows no word: then every prompt has the same condition, and nothing else would tell."""
    start_and_end = set(plain_ids(encode_ids(['']))[0])
    alone = []
    for ids in plain_ids(encode_ids(list(COMMON_WORDS))):
        alone.append(frozenset(ids) - start_and_end)
    known = 0
    for ids in alone:
        if ids and alone.count(ids) == 1:                  # unknown words share one id
            known += 1
    first, second = plain_ids(encode_ids([' '.join(COMMON_WORDS[:5]), ' '.join(COMMON_WORDS[5:])]))
    if first == second or 2 * known <= len(COMMON_WORDS):
        raise ValueError(f'the word tokenizer knows {known} of {len(COMMON_WORDS)} common words '
                         f'({", ".join(COMMON_WORDS)}) and cannot tell prompts apart; are its '
                         'files (tokenizer.json, or vocab.json and merges.txt, or vocab.txt) there and '
                         'whole?')


def plain_ids(rows):
    """Rows of ids, tensors or lists -> lists of int."""
    return [[int(number) for number in row] for row in rows]


def tell_if_cut(tokenizer, caption, length, reader):
    """Has a prompt more pieces than its reader has places? Then a note says so."""
    n = len(tokenizer([caption], verbose=False)['input_ids'][0])
    if n > length and is_rank0():
        print(f'note: a prompt has {n} pieces, {reader} reads {length}: it and others like it are cut; '
              f'it begins: {printable(caption, 60)}')
    return n > length


# -----------------------------------------------------------------------------
# The encoder

class TextEncoder:
    """captions -> (words (B, T, C), pooled (B, P), guide (B, T, C)), float32, on `device`; T is 77.

    Words are the output of the last layer but one, pooled is the last state of the end token,
    normed and projected, guide all last states, normed. The tower sees no attention mask, as when
    it was trained, so padding counts: it is 0, as in the published samplers. Nothing here is
    trained. Raises ValueError where tower and tokenizer do not belong together."""

    def __init__(self, tower, tokenizer, device='cpu', batch=64, keep=256):
        self.tower = tower.float().to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.length = tower.config.max_position_embeddings
        self.batch = batch                                 # training prompts a pass
        self.keep = keep                                   # 256 are .2 GB of ViT-H
        self.known = OrderedDict()                         # caption -> words, pooled, guide
        self.told = True                                   # of a cut prompt; the checks are silent
        check_reads_text(self.token_ids)
        self.check_fit()
        self.told = False

    def check_fit(self):
        """Raise ValueError unless tower and tokenizer have the same ids, and the same end token."""
        start, *_, end = self.pieces([' '.join(COMMON_WORDS)])[0]
        rows = self.tower.config.vocab_size
        if max(start, end, len(self.tokenizer) - 1) >= rows:
            raise ValueError(f'the word tokenizer has {len(self.tokenizer)} ids, the text tower '
                             f'{rows}; they are not of one release')
        wanted = self.tower.config.eos_token_id
        largest = wanted == 2 and end == rows - 1          # old files: 2 stands for the largest id
        if wanted != end and not largest:
            raise ValueError(f'the word tokenizer ends a prompt with id {end}, the text tower '
                             f'looks for {wanted}; they are not of one release')

    def pieces(self, captions):
        """Lists of ids, start to end token, cut to T with the end token kept."""
        found = self.tokenizer(list(captions), truncation=True, max_length=self.length)['input_ids']
        for caption, ids in zip(captions, found):
            if len(ids) == self.length and not self.told:
                self.told = tell_if_cut(self.tokenizer, caption, self.length, 'the text tower')
        return found

    def token_ids(self, captions):
        """-> ids (B, T), int64, padded with 0."""
        ids = torch.zeros(len(captions), self.length, dtype=torch.int64)
        for k, row in enumerate(self.pieces(captions)):
            ids[k, :len(row)] = torch.tensor(row)
        return ids

    @torch.no_grad()
    def encode_ids(self, ids):
        """ids (B, T) -> words (B, T, C), pooled (B, P), guide (B, T, C), in one pass."""
        with torch.autocast(self.device.type, enabled=False):
            out = self.tower(input_ids=ids.to(self.device), output_hidden_states=True)
        return out.hidden_states[-2], out.text_embeds, out.last_hidden_state

    def encode(self, captions, training=False):
        """captions -> (words (B, T, C), pooled (B, P), guide (B, T, C)). What is looked at
        (pictures, metrics, the null prompt) is encoded prompt by prompt and remembered, so that its
        bits depend on no batch. Training prompts are encoded together, which is far quicker, and
        forgotten: a resumed run meets the same batches, so it has the same bits."""
        parts = []
        if training:
            ids = self.token_ids(captions)
            for some in ids.split(self.batch):
                parts.append(self.encode_ids(some))
        else:
            for caption in captions:
                parts.append(self.remembered(caption))
        words, pooled, guide = zip(*parts)
        return torch.cat(words), torch.cat(pooled), torch.cat(guide)

    __call__ = encode

    def weights(self):
        """What its conditions depend on: {name: tensor}."""
        return dict(self.tower.named_parameters())

    def remembered(self, caption):
        """One prompt, encoded alone: words (1, T, C), pooled (1, P), guide (1, T, C)."""
        if caption not in self.known:
            self.known[caption] = self.encode_ids(self.token_ids([caption]))
        self.known.move_to_end(caption)
        if len(self.known) > self.keep:
            self.known.popitem(last=False)                 # that was asked for longest ago
        return self.known[caption]


class RandomText:
    """In the place of a TextEncoder where a published size is timed without any file: numbers that
    follow from the caption."""

    def __init__(self, T, C, P, device):
        self.T, self.C, self.P, self.device = T, C, P, device

    def weights(self):
        return {}

    def encode(self, captions, training=False):
        words, pooled = [], []
        for caption in captions:
            rng = rng_for(0, 0, caption)
            words.append(torch.randn(self.T, self.C, generator=rng))
            pooled.append(torch.randn(self.P, generator=rng))
        words = torch.stack(words).to(self.device)
        return words, torch.stack(pooled).to(self.device), words


def load_text_encoder(path, activation, n_head=None, words_path='', device='cpu'):
    """The encoder of a tower and its word tokenizer, which lies in its folder, or in `tokenizer`
    beside that, or at words_path. Raises ValueError, FileNotFoundError."""
    tower = load_tower(path, activation, n_head)
    tokenizer = load_words(words_path or path)
    return TextEncoder(tower, tokenizer, device)


# -----------------------------------------------------------------------------
# Prompts from a file

FORMS = {
    '.txt': 'a prompt a line',
    '.jsonl': 'an object with "prompt" a line',
    '.json': 'a list of strings, or of objects with "prompt"',
    '.csv': 'a table with the column text',
}
FIRST = 256                            # prompts of a file that a checkpoint holds


class PromptFile:
    """The prompts of a file in place of a list of them: len(), [k] -> str. Of .txt and .jsonl
    memory holds where each line begins, 8 bytes a prompt, and the file is mapped; .json and .csv
    are read whole. Blank prompts are skipped, and white space becomes single blanks. path; digest
    of the file. Raises FileNotFoundError, ValueError with the number of the line."""

    def __init__(self, path):
        self.path = os.path.abspath(path)
        self.kind = os.path.splitext(self.path)[1].lower()
        known = '; '.join(f'{kind} ({form})' for kind, form in FORMS.items())
        if not os.path.isfile(self.path):
            raise FileNotFoundError(f'{path}: no such file of prompts, expected {known}')
        if self.kind not in FORMS:
            raise ValueError(f'{path}: unknown kind of prompt file, expected {known}')
        self.digest = file_digest(self.path)
        self.begins, self.listed = None, None
        if self.kind == '.json':
            self.listed = prompts_of_json(self.path)
        elif self.kind == '.csv':
            self.listed = prompts_of_csv(self.path)
        else:
            self.begins = line_begins(self.path, self.kind)             # int64 (number of prompts,)
        if not len(self):
            raise ValueError(f'{path}: no prompts in it, expected {FORMS[self.kind]}')
        if self.listed is None:
            with open(self.path, 'rb') as file:
                self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self):
        if self.listed is not None:
            return len(self.listed)
        return len(self.begins)

    def __getitem__(self, k):
        if isinstance(k, slice):
            return [self[j] for j in range(*k.indices(len(self)))]
        k = range(len(self))[operator.index(k)]            # negative ones too; IndexError
        if self.listed is not None:
            return self.listed[k]
        begin = int(self.begins[k])
        end = self.mapped.find(b'\n', begin)
        if end < 0:
            end = len(self.mapped)                          # the last line
        return one_line(text_of_line(self.mapped[begin:end], self.kind))

    def pack(self):
        """What a checkpoint stores of it, for `same_prompts`."""
        return dict(path=self.path, digest=self.digest, first=self[:FIRST])


def prompt_source(path):
    """The prompts of --prompts=FILE: .txt, .jsonl, .json or .csv -> PromptFile."""
    return PromptFile(path)


def read_prompts(path):
    """All prompts of such a file -> list of str."""
    return PromptFile(path)[:]


def same_prompts(packed, before):
    """Raise ValueError where the file of prompts is not any more what it was when a checkpoint was
    made; both are what `pack` gives. Another file is a choice."""
    if packed['path'] == before['path'] and packed['digest'] != before['digest']:
        raise ValueError(f'{packed["path"]}: has changed since the checkpoint was made, where it began with '
                         f'"{printable(before["first"][0], 60)}"; give that file with --prompts=...')


def line_begins(path, kind):
    """Where the lines with a prompt begin: int64 (number of prompts,). All are checked. Raises
    ValueError."""
    begins, position = array('q'), 0
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            try:
                text = text_of_line(line, kind)
            except ValueError as error:
                raise ValueError(f'{path}, line {number}: {error}') from None
            if text.strip():
                begins.append(position)
            position += len(line)
    return np.array(begins, dtype=np.int64)


def text_of_line(line, kind):
    """The text in the bytes of a line; blank where there is no prompt. Raises ValueError."""
    text = decoded(line)
    if kind == '.jsonl' and text.strip():
        text = text_of_entry(read_json(text, FORMS[kind]))
    return text


def decoded(content):
    try:
        return content.decode('utf-8-sig')                 # some files begin with a byte-order mark
    except UnicodeDecodeError:
        raise ValueError('not UTF-8; save the file as UTF-8') from None


def read_json(text, expected):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f'{error.msg} in line {error.lineno}'
        if '\n' not in text.strip():
            place = error.msg
        raise ValueError(f'not JSON ({place}), expected {expected}') from None
    except RecursionError:
        raise ValueError(f'not JSON (too deep), expected {expected}') from None


def text_of_entry(entry):
    """A text, or the one under "prompt" of a JSON object. Raises ValueError."""
    if isinstance(entry, dict):
        if 'prompt' not in entry:
            raise ValueError(f'expected the key prompt, it has {printable(", ".join(entry)) or "none"}')
        entry = entry['prompt']
    if not isinstance(entry, str):
        raise ValueError(f'expected a text, got {printable(entry, 60)}')
    try:
        entry.encode('utf-8')
    except UnicodeEncodeError:
        raise ValueError('not Unicode, it holds half of a character') from None
    return entry


def prompts_of_json(path):
    """The prompts of a .json file. Raises ValueError with the number of the line or the entry."""
    with open(path, 'rb') as file:
        content = file.read()
    try:
        entries = read_json(decoded(content), FORMS['.json'])
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    if not isinstance(entries, list):
        raise ValueError(f'{path}: expected {FORMS[".json"]}, got {printable(entries, 60)}')
    prompts = []
    for number, entry in enumerate(entries, 1):
        try:
            text = text_of_entry(entry)
        except ValueError as error:
            raise ValueError(f'{path}, entry {number}: {error}') from None
        prompts.append(one_line(text))
    return [prompt for prompt in prompts if prompt]


def prompts_of_csv(path):
    """The column text of a .csv file. Raises ValueError."""
    prompts = []
    try:
        with open(path, encoding='utf-8-sig', newline='') as file:
            table = csv.DictReader(file, strict=True)
            columns = table.fieldnames or []
            if 'text' not in columns:
                raise ValueError(f'{path}: expected the column text, it has '
                                 f'{printable(", ".join(columns)) or "none"}')
            for row in table:
                if None in row:                                # where csv puts what is too much
                    raise ValueError(f'{path}, line {table.reader.line_num}: more columns than the '
                                     'first line names; a prompt with a comma needs quotes')
                if row['text']:                            # a short row has none
                    prompts.append(one_line(row['text']))
    except UnicodeDecodeError:
        raise ValueError(f'{path}: not UTF-8; save the file as UTF-8') from None
    except csv.Error as error:
        raise ValueError(f'{path}, line {table.reader.line_num}: {error}; is a quote missing there '
                         'or before?') from None
    return [prompt for prompt in prompts if prompt]
