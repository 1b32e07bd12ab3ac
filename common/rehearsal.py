"""
For the tests: a miniature of what a text-to-image teacher asks of the stages. Its condition is a tuple, its 12 positions
form no square, its decoder wants captions. Importing this puts it in the place of every teacher.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from common import teachers
from common.images import word_ids
from common.world import CAPTION_LENGTH, WORDS, draw
from model import MDM


class TupleMDM(MDM):
    """cond = (word ids (B, T), a score (B, 1))."""

    def words(self, cond):
        ids, score = cond
        return self.cond_emb(ids) + 0.01 * score[..., None]

    def null(self, cond):
        return torch.full_like(cond[0], self.n_words), cond[1]


class Stripes(nn.Module):
    """12 codes in a row <-> an image of 12 stripes, a little brighter for a longer caption."""
    config = dict(image_size=32)
    N, V, S, batch = 12, 16, 1, 5

    def __init__(self):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.codes = nn.Parameter(torch.rand(16, 3, generator=rng) * 2 - 1)

    def encode(self, images):
        rows = F.adaptive_avg_pool2d(images, (12, 1))[..., 0].transpose(1, 2)      # (B, 12, 3)
        return torch.cdist(rows, self.codes[None]).argmin(-1)

    def decode(self, x, captions=None):
        if not isinstance(captions, list) or len(captions) != len(x):
            raise ValueError(f'{len(x)} images need as many captions, got {captions!r}')
        rows = x @ self.codes if x.is_floating_point() else self.codes[x]           # (B, 12, 3)
        length = torch.tensor([len(caption) for caption in captions])
        rows = rows + 0.001 * length[:, None, None]
        return F.interpolate(rows.transpose(1, 2)[..., None], (32, 32))

    def decoder_in(self, dtype):
        return self

    def digest(self):
        return 'stripes'

    def pack(self):
        return dict(kind='stripes', digest='stripes')


def encode(captions):
    score = torch.tensor([[float(len(caption))] for caption in captions])
    return word_ids(captions, WORDS, CAPTION_LENGTH), score


def around(net):
    prompts = draw(range(64))[1]
    return teachers.Teacher('tuple', net.eval().requires_grad_(False), Stripes().requires_grad_(False),
                            encode, prompts, prompts, 'shapes', words=None, config=dict(n_images=64))


def load_teacher(*anything):
    torch.manual_seed(0)
    net = TupleMDM(12, 16, 24, 2, 2, len(WORDS), CAPTION_LENGTH)
    for p in net.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    return around(net)


def unpack(state, device='cpu', weights='ema', *anything):
    net = TupleMDM(**state['args'])
    net.load_state_dict(state[weights])
    return around(net)


teachers.load_teacher, teachers.unpack = load_teacher, unpack
