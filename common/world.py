"""The shapes world: coloured shapes on a small canvas, drawn by rule.

Everything about an image follows from its index: `draw` renders it and says its caption. As the
rules are known, they also serve the other way round: `check` says whether an image shows what its
caption asks for, and `factors` whether a set of images still has the variety of the real ones.
`Shapes`, at the end, offers all this as a source of training data.
"""
import functools
import re
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage


# -----------------------------------------------------------------------------
# What there is in the world

SIZE = 32                  # the canvas, in pixels a side
CELL = 16                  # a quarter of the canvas; each object lies inside a square of this side
HELD_OUT = 2 ** 31         # images with an index from here on are never trained on
WORLDS = ('shapes', 'shapes-open')  # one background, or any of the four, which captions never name

COLORS = {
    'red': (222, 48, 48),
    'green': (36, 176, 72),
    'blue': (52, 96, 240),
    'yellow': (248, 212, 48),
}
SHAPES = ('circle', 'square', 'triangle', 'cross')
PLURALS = ('circles', 'squares', 'triangles', 'crosses')
NUMBERS = {'two': 2, 'three': 3, 'four': 4}
RELATIONS = ('left of', 'right of', 'above', 'below')
RADII = (4.0, 6.0)         # small and large, in pixels; captions never name the size
BACKGROUNDS = ((24, 24, 32), (236, 232, 222), (128, 128, 136), (226, 150, 200))
PALETTE = np.array([*COLORS.values(), *BACKGROUNDS], dtype=np.float32)  # (8, 3)
COLOR_NAMES = tuple(COLORS)

# The six tasks of GenEval (arXiv 2310.11513), and how many objects each shows; counting: 2 to 4.
TASKS = ('single_object', 'two_object', 'counting', 'colors', 'position', 'color_attr')
OBJECTS_OF_TASK = np.array([1, 2, 0, 1, 2, 2])

WORDS = ('a', 'and', *NUMBERS, *COLORS, *SHAPES, *PLURALS,
         'shape', 'left', 'right', 'of', 'above', 'below')
CAPTION_LENGTH = 8         # words of the longest caption: 'a red circle left of a blue square'

# Top left corners (row, column) of the cells of up to four objects. Only the first n are used.
LAYOUTS = np.array([
    [(8, 8), (8, 8), (8, 8), (8, 8)],          # one object
    [(0, 0), (16, 16), (0, 0), (16, 16)],      # two
    [(0, 0), (0, 16), (16, 8), (0, 0)],        # three
    [(0, 0), (0, 16), (16, 0), (16, 16)],      # four
    [(8, 0), (8, 16), (8, 0), (8, 16)],        # the first left of the second
    [(8, 16), (8, 0), (8, 16), (8, 0)],        # right of
    [(0, 8), (16, 8), (0, 8), (16, 8)],        # above
    [(16, 8), (0, 8), (16, 8), (0, 8)],        # below
])
RELATED_LAYOUT = 4         # row of LAYOUTS where those of the RELATIONS begin
LONE_SHIFT = 4             # a lone object lies that many pixels off the middle, in both directions

# What the checker tolerates
SPECK = 8                  # smaller connected parts, in pixels, are noise and no objects
MIN_OVERLAP = 0.6          # intersection over union from which on a shape is recognised
APART = 4                  # 'left of' and so on hold if the centres lie more pixels apart than this


# -----------------------------------------------------------------------------
# Drawing

N_RANDOM = 32              # random numbers in [0, 1) of each image, and what their columns decide:
U_TASK = 0
U_RELATION = 1
U_OTHER = 2                # which of the other colours or shapes the second object of a pair has
U_NUMBER = 3
U_COLOR = slice(4, 8)      # of up to four objects
U_SHAPE = slice(8, 12)
U_SIZE = slice(16, 20)
U_PLACE = slice(20, 22)    # of a lone object: up or down, left or right
U_BACKGROUND = 28
U_FORM = 29                # which of its two forms the caption of the colour task has


def draw(index, open_background=False, scale=1):
    """Render images of the shapes world: index (B,) ints -> images float (B, 3, 32 scale, 32 scale)
    in [-1, 1] and their captions, a list of str.

    Image i shows the same on every machine, as NumPy's legacy generator is frozen, and at every
    scale. The caption fixes the layout; what it leaves open is uniform: sizes, the place of a lone
    object, colour or shape where unnamed, and the background if `open_background`."""
    index = np.atleast_1d(np.asarray(index, dtype=np.int64))
    choices = random_choices(index)
    scenes = arrange(choices, open_background)
    return paint(scenes, scale), captions_of_scenes(choices, scenes)


def captions_of_scenes(choices, scenes):
    captions = []
    for i in range(len(scenes.task)):
        captions.append(caption_of(scenes.task[i], choices.u_form[i], scenes.color[i],
                                   scenes.shape[i], scenes.relation[i], scenes.n[i]))
    return captions


def pick(u, n):
    """Random numbers in [0, 1) -> ints of the same shape, uniform in 0 ... n - 1."""
    return (u * n).astype(int)


def random_choices(index):
    """Read the random numbers of images index (B,) as choices: a namespace of arrays with B rows.
    Every choice is made for every image, whether its task uses it or not."""
    u = np.stack([np.random.RandomState(i).random_sample(N_RANDOM) for i in index])  # (B, 32)
    choices = SimpleNamespace()
    choices.task = pick(u[:, U_TASK], len(TASKS))  # (B,)
    choices.relation = pick(u[:, U_RELATION], len(RELATIONS))
    choices.number = 2 + pick(u[:, U_NUMBER], len(NUMBERS))  # 2, 3 or 4
    choices.color = pick(u[:, U_COLOR], len(COLORS))  # (B, 4 objects)
    choices.shape = pick(u[:, U_SHAPE], len(SHAPES))
    choices.size = pick(u[:, U_SIZE], len(RADII))
    choices.color_step = 1 + pick(u[:, U_OTHER], len(COLORS) - 1)  # (B,) never back to the same
    choices.shape_step = 1 + pick(u[:, U_OTHER], len(SHAPES) - 1)
    choices.place = pick(u[:, U_PLACE], 2)  # (B, 2) row and column, 0 or 1
    choices.background = pick(u[:, U_BACKGROUND], len(BACKGROUNDS))  # (B,)
    choices.u_form = u[:, U_FORM]  # (B,) in [0, 1)
    return choices


def arrange(choices, open_background):
    """Decide what each image shows and where, as its task demands: a namespace with task, relation,
    n (objects) and background (B,), color, shape and size (B, 4), corner (B, 4, row and column)."""
    task = choices.task
    counting = task == TASKS.index('counting')
    position = task == TASKS.index('position')
    shape_pair = task == TASKS.index('two_object')  # told apart by their shapes
    color_pair = position | (task == TASKS.index('color_attr'))  # told apart by their colours

    color = choices.color.copy()
    shape = choices.shape.copy()
    other_color = (color[:, 0] + choices.color_step) % len(COLORS)
    other_shape = (shape[:, 0] + choices.shape_step) % len(SHAPES)
    color[:, 1] = np.where(color_pair, other_color, color[:, 1])
    shape[:, 1] = np.where(shape_pair, other_shape, shape[:, 1])
    color[counting] = color[counting, :1]  # all objects are alike
    shape[counting] = shape[counting, :1]

    n = np.where(counting, choices.number, OBJECTS_OF_TASK[task])
    layout = np.where(position, RELATED_LAYOUT + choices.relation, n - 1)
    direction = 2 * choices.place - 1  # -1 or 1
    lone = n == 1
    shift = LONE_SHIFT * direction * lone[:, None]  # (B, 2), 0 for several objects
    corner = LAYOUTS[layout] + shift[:, None]

    background = choices.background
    if not open_background:
        background = np.zeros_like(background)
    return SimpleNamespace(task=task, relation=choices.relation, n=n, color=color, shape=shape,
                           size=choices.size, corner=corner, background=background)


def paint(scenes, scale):
    """Scenes as `arrange` returns them -> images float (B, 3, 32 scale, 32 scale) in [-1, 1]."""
    B = len(scenes.n)
    canvas = np.zeros((B, SIZE * scale, SIZE * scale, 3), dtype=np.float32)
    canvas += PALETTE[len(COLORS) + scenes.background][:, None, None]
    steps = np.arange(CELL * scale)
    for k in range(4):
        drawn = np.flatnonzero(scenes.n > k)  # (b,) images with a k-th object
        corner = scenes.corner[drawn, k] * scale  # (b, row and column)
        rows = corner[:, :1] + steps  # (b, 16 scale)
        columns = corner[:, 1:] + steps
        cell = (drawn[:, None, None], rows[:, :, None], columns[:, None, :])
        opacity = sprites(scale)[scenes.shape[drawn, k], scenes.size[drawn, k]][..., None]
        color = PALETTE[scenes.color[drawn, k]][:, None, None]  # (b, 1, 1, 3)
        below = canvas[cell]  # (b, 16 scale, 16 scale, 3)
        canvas[cell] = below + opacity * (color - below)
    images = torch.from_numpy(np.rint(canvas)).permute(0, 3, 1, 2)
    return (images / 127.5 - 1).contiguous()


@functools.cache
def sprites(scale=1):
    """Opacity of every shape in every size, centred in a cell: (4 shapes, 2 sizes, 16 scale,
    16 scale) in [0, 1], anti-aliased from signed distances, which are negative inside. The renderer
    pastes them, the checker compares with them."""
    pixels = np.mgrid[:CELL * scale, :CELL * scale]
    y, x = (pixels + 0.5) / scale - CELL / 2  # of their centres, from the middle
    r = np.array(RADII)[:, None, None]
    circle = np.hypot(x, y) - r  # (2, 16 scale, 16 scale)
    square = np.maximum(abs(x), abs(y)) - r
    # The legs fall by 2 per step to the side; dividing by |(2, 1)| = sqrt(5) gives a distance.
    legs = (2 * abs(x) - y - r) / 5 ** 0.5
    triangle = np.maximum(legs, y - r)
    lying_bar = np.maximum(abs(x) - r, abs(y) - r / 2 + 1)
    standing_bar = np.maximum(abs(y) - r, abs(x) - r / 2 + 1)
    cross = np.minimum(lying_bar, standing_bar)
    distance = np.stack([circle, square, triangle, cross])
    return np.clip(0.5 - scale * distance, 0, 1).astype(np.float32)  # the edge is one pixel wide


def facts(index, open_background=False):
    """What the images at index (B,) show: bool (B, 75). At which places objects lie, on a grid of
    LONE_SHIFT pixels; which kinds of objects there are, of a colour, a shape and a size; which
    colours, shapes and sizes; how many objects; the background."""
    scenes = arrange(random_choices(np.asarray(index, dtype=np.int64)), open_background)
    B = len(scenes.n)
    places = np.zeros((B, 5, 5), dtype=bool)
    kinds = np.zeros((B, len(COLORS), len(SHAPES), len(RADII)), dtype=bool)
    for k in range(4):
        drawn = np.flatnonzero(scenes.n > k)           # images with a k-th object
        row, column = scenes.corner[drawn, k].T // LONE_SHIFT
        places[drawn, row, column] = True
        kinds[drawn, scenes.color[drawn, k], scenes.shape[drawn, k], scenes.size[drawn, k]] = True
    colors = kinds.any((2, 3))                         # alone, they would be read less surely
    shapes = kinds.any((1, 3))
    sizes = kinds.any((1, 2))
    number = np.arange(1, 5) == scenes.n[:, None]
    background = np.arange(len(BACKGROUNDS)) == scenes.background[:, None]
    return np.concatenate([places.reshape(B, -1), kinds.reshape(B, -1), colors, shapes, sizes, number, background], 1)


# -----------------------------------------------------------------------------
# Captions

def caption_of(task, u, color, shape, relation, n):
    """The words for one image. task, relation and n (objects) are ints, color and shape ints of at
    least two objects; u in [0, 1) decides between the two forms of the colour task."""
    name = TASKS[task]
    first = SHAPES[shape[0]]
    second = SHAPES[shape[1]]
    if name == 'single_object':
        return f'a {first}'
    if name == 'two_object':
        return f'a {first} and a {second}'

    first_color = COLOR_NAMES[color[0]]
    second_color = COLOR_NAMES[color[1]]
    if name == 'counting':
        number = tuple(NUMBERS)[n - 2]  # 2 is 'two'
        return f'{number} {first_color} {PLURALS[shape[0]]}'
    if name == 'position':
        return f'a {first_color} {first} {RELATIONS[relation]} a {second_color} {second}'
    if name == 'color_attr':
        return f'a {first_color} {first} and a {second_color} {second}'
    if u < 0.5:
        return f'a {first_color} {first}'
    return f'a {first_color} shape'


# One or several alike objects, as 'a circle' or 'two red circles'. The colour may be missing.
NUMBER_PATTERN = '|'.join(['a', *NUMBERS])
COLOR_PATTERN = '|'.join(['', *COLORS])
SHAPE_PATTERN = '|'.join([*SHAPES, 'shape'])
PHRASE = (rf'(?P<number>{NUMBER_PATTERN}) ?(?P<color>{COLOR_PATTERN}) '
          rf'(?P<shape>{SHAPE_PATTERN})(e?s)?')


def parse_caption(caption):
    """What a caption asks for: (task, [(colour or '', shape or '')] per object, relation or '').
    Raises ValueError for a caption outside the grammar."""
    text = caption.strip().lower()
    relation = relation_in(text)
    joint = ' and '
    if relation:
        joint = f' {relation} '
    phrases = text.split(joint)
    if len(phrases) > 2:
        raise outside_grammar(phrases[0], caption)

    objects = []
    counted = False
    for phrase in phrases:
        match = re.fullmatch(PHRASE, phrase)
        if match is None:
            raise outside_grammar(phrase, caption)
        color = match['color']
        shape = match['shape']
        if shape == 'shape':
            shape = ''  # any shape will do
        if match['number'] == 'a':
            objects.append((color, shape))
        else:
            counted = True
            objects += [(color, shape)] * NUMBERS[match['number']]
    if counted and len(phrases) > 1:
        raise ValueError(f'{caption!r} is outside the grammar: a number stands alone, '
                         'as in "three green squares"')
    return task_of(objects, counted, relation), objects, relation


def relation_in(text):
    """The relation that a text names, '' if none."""
    for relation in RELATIONS:
        if f' {relation} ' in text:
            return relation
    return ''


def outside_grammar(phrase, caption):
    """The error for a phrase that the grammar does not know."""
    return ValueError(f'{phrase!r} in {caption!r} is outside the grammar, which reads like '
                      '"a red circle left of a blue square", "three green squares", '
                      '"a circle and a cross" or "a yellow shape"')


def task_of(objects, counted, relation):
    """Into which of the TASKS a caption falls that asks for these objects."""
    if relation:
        return 'position'
    if counted:
        return 'counting'
    colored = all(color for color, shape in objects)
    if len(objects) > 1:
        if colored:
            return 'color_attr'
        return 'two_object'
    if colored:
        return 'colors'
    return 'single_object'


# With a word replaced by another of its group a caption keeps its grammar, but not its meaning.
WORD_GROUPS = (tuple(NUMBERS), COLOR_NAMES, SHAPES, PLURALS, ('left', 'right'), ('above', 'below'))


def wrong_caption(caption, u):
    """The caption with one fact (a colour, a shape, the number, the relation) changed, or exchanged
    between its two objects. Three uniform numbers u choose the place, whether to exchange, and the
    new word. Raises ValueError for a caption that names no such fact."""
    u_place, u_exchange, u_word = u
    words = caption.split()
    places = []
    for k, word in enumerate(words):
        for group in WORD_GROUPS:
            if word in group:
                places.append((k, group))
    if not places:
        raise ValueError(f'{caption!r} names no colour, shape, number or relation that could be '
                         'changed; expected a caption like "a red circle"')
    k, group = places[int(u_place * len(places))]

    if u_exchange < 0.4:
        for j, other_group in places:
            if other_group == group and words[j] != words[k]:
                changed = ' '.join(exchanged(words, j, k))
                # 'a red cross and a blue cross' says the same with the colours exchanged
                if set(changed.split(' and ')) != set(caption.split(' and ')):
                    return changed

    others = [word for word in group if word != words[k]]
    words[k] = others[int(u_word * len(others))]
    return ' '.join(words)


def mirrored(caption):
    """The caption of the mirror image: left and right exchanged, in any text in English."""
    return re.sub(LEFT_OR_RIGHT, other_side, caption, flags=re.IGNORECASE)


LEFT_OR_RIGHT = r'(?<![^\W_])(left|right)(?=most|hand|ward|[\W_]|$)'      # not in bright or cleft


def other_side(match):
    """A match of one side -> the other, with capitals where the first has them."""
    word = match[0]
    other = 'right' if word.lower() == 'left' else 'left'
    if word.isupper():
        return other.upper()
    return other.capitalize() if word.istitle() else other


def exchanged(words, j, k):
    """A copy of the list with the words at j and k exchanged."""
    words = list(words)
    first = words[j]
    words[j] = words[k]
    words[k] = first
    return words


# -----------------------------------------------------------------------------
# Looking at images

def look(images):
    """Find the objects in images (B, 3, H, H), averaged to 32 x 32 if larger: a dict of int arrays.
    With one entry per object: `image` (in which it is), `color`, `shape` (-1 where none fits),
    `size`, `row` and `column` (its centre). With one entry per image: `background`."""
    nearest = nearest_colors(images)
    found, masks = find_objects(nearest)
    shape, size, row_shift, column_shift = classify(masks)
    return {
        'image': found['image'],
        'color': found['color'],
        'shape': shape,
        'size': size,
        'row': found['row'] + row_shift,
        'column': found['column'] + column_shift,
        'background': find_backgrounds(nearest),
    }


def nearest_colors(images):
    """The row of PALETTE nearest to each pixel: images (B, 3, H, H) -> ints (B, 32, 32)."""
    small = F.adaptive_avg_pool2d(images.detach().float().cpu().clamp(-1, 1), SIZE)
    rgb = (small.permute(0, 2, 3, 1).numpy() + 1) * 127.5  # (B, 32, 32, 3) in [0, 255]
    distance = ((rgb[:, :, :, None] - PALETTE) ** 2).sum(-1)  # (B, 32, 32, 8)
    return distance.argmin(-1)


def find_backgrounds(nearest):
    """The most frequent background of each image: nearest (B, 32, 32) -> ints (B,)."""
    areas = []
    for k in range(len(BACKGROUNDS)):
        areas.append((nearest == len(COLORS) + k).sum((1, 2)))
    return np.stack(areas, 1).argmax(1)


def find_objects(nearest):
    """Objects are connected pixels of object colours: nearest (B, 32, 32) -> a dict of `image`,
    `color` (the most frequent), `row` and `column` (the centre of the bounding box), int arrays
    (n,), and the masks of the objects, float (n, 16, 16), around that centre."""
    neighbours = np.zeros((3, 3, 3), dtype=bool)
    neighbours[1] = ndimage.generate_binary_structure(2, 1)  # four, none in another image
    is_object = nearest < len(COLORS)
    label, _ = ndimage.label(is_object, structure=neighbours)  # (B, 32, 32): 0, objects 1, 2, ...
    area = np.bincount(label.ravel())
    padded = np.pad(label, ((0, 0), (CELL, CELL), (CELL, CELL)))  # for objects at the border

    found = {'image': [], 'color': [], 'row': [], 'column': []}
    masks = []
    boxes = ndimage.find_objects(label)
    for number, box in enumerate(boxes, start=1):
        if area[number] < SPECK:
            continue
        image = box[0].start
        row = (box[1].start + box[1].stop) // 2
        column = (box[2].start + box[2].stop) // 2
        colors = nearest[box][label[box] == number]
        top = row + CELL // 2  # row - CELL // 2, in `padded`
        left = column + CELL // 2
        found['image'].append(image)
        found['color'].append(np.bincount(colors).argmax())
        found['row'].append(row)
        found['column'].append(column)
        masks.append(padded[image, top:top + CELL, left:left + CELL] == number)
    found = {name: np.array(values, dtype=int) for name, values in found.items()}
    masks = np.array(masks, dtype=np.float32).reshape(-1, CELL, CELL)  # also if n = 0
    return found, masks


def classify(masks):
    """Masks (n, 16, 16), 0 or 1 -> shape (-1 where none fits), size, and shift in rows and columns,
    ints (n,): those of the sprite, moved by up to one pixel, that overlaps most."""
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    solid = sprites() > 0.5  # (4, 2, 16, 16)
    moved = np.stack([np.roll(solid, shift, (2, 3)) for shift in shifts], 2)  # (4, 2, 9, 16, 16)
    templates = moved.astype(np.float32).reshape(-1, CELL * CELL)  # (72, 256)
    masks = masks.reshape(-1, CELL * CELL)  # (n, 256)

    intersection = masks @ templates.T  # (n, 72) pixels
    union = masks.sum(1)[:, None] + templates.sum(1) - intersection
    overlap = intersection / union
    best = overlap.argmax(1)
    shape, size, shift = np.unravel_index(best, (len(SHAPES), len(RADII), len(shifts)))
    shape = np.where(overlap.max(1) >= MIN_OVERLAP, shape, -1)
    row_shift, column_shift = np.array(shifts)[shift].T
    return shape, size, row_shift, column_shift


# -----------------------------------------------------------------------------
# Does an image show what its caption says?

def check(images, captions):
    """Does each image show exactly what its caption says? images (B, 3, H, H), captions -> bool
    (B,). No object may be missing, none too many, names and relation must be right. This is the
    counterpart by rules of GenEval, which asks a detector.
    Raises ValueError for a caption outside the grammar."""
    found = look(images)
    verdict = np.zeros(len(captions), dtype=bool)
    for i, caption in enumerate(captions):
        _, wanted, relation = parse_caption(caption)
        verdict[i] = shows(objects_in(found, i), wanted, relation)
    return verdict


def objects_in(found, i):
    """The objects of image i among those that `look` found: a list of namespaces with the names
    color and shape ('' if unknown), row and column."""
    shape_names = (*SHAPES, '')  # the last is that of -1
    objects = []
    for k in np.flatnonzero(found['image'] == i):
        color = COLOR_NAMES[found['color'][k]]
        shape = shape_names[found['shape'][k]]
        row = found['row'][k]
        column = found['column'][k]
        objects.append(SimpleNamespace(color=color, shape=shape, row=row, column=column))
    return objects


def shows(seen, wanted, relation):
    """Are the objects seen in an image (by `objects_in`) those wanted (by `parse_caption`), no more
    and no fewer, in the relation asked for? Either of two may be the one that is named first."""
    if len(seen) != len(wanted):
        return False
    if any(item.shape == '' for item in seen):
        return False
    for order in (seen, seen[::-1]):
        matched = all(fits(item, want) for item, want in zip(order, wanted))
        if matched and related(order[0], order[-1], relation):
            return True
    return False


def fits(item, want):
    """Has the object seen the colour and the shape wanted, where they are named?"""
    color, shape = want
    return color in ('', item.color) and shape in ('', item.shape)


def related(first, second, relation):
    """Does the relation hold between two objects seen? No relation, '', always does."""
    if relation == 'left of':
        return second.column - first.column > APART
    if relation == 'right of':
        return first.column - second.column > APART
    if relation == 'above':
        return second.row - first.row > APART
    if relation == 'below':
        return first.row - second.row > APART
    return True


# -----------------------------------------------------------------------------
# Is the variety of the world still there?

LONGEST_LAW = 9            # values of the factor that has most: 'groups'


def factors(images, captions, world='shapes'):
    """Mode dropping, factor by factor: the total variation distance, in [0, 1], between what the
    images show and the known law (uniform, independent) of all that the captions leave open.
    images (B, 3, H, H), captions -> {factor: distance}; .5 for a factor of which nothing is seen.
    Raises ValueError for a caption outside the grammar."""
    found = look(images)
    asked = [parse_caption(caption)[1] for caption in captions]  # objects of each caption
    no_color = np.array([objects[0][0] == '' for objects in asked], dtype=bool)
    no_shape = np.array([objects[0][1] == '' for objects in asked], dtype=bool)
    only_one = np.array([len(objects) == 1 for objects in asked], dtype=bool)

    # From here on an entry is an object, (n,); unknown shapes are left out.
    image = found['image']
    color = found['color']
    shape = found['shape']
    size = found['size']
    known = shape >= 0
    color_open = no_color[image] & known
    shape_open = no_shape[image] & known
    alone = only_one[image] & known
    lower_half = found['row'] >= SIZE // 2
    right_half = found['column'] >= SIZE // 2
    quadrant = 2 * lower_half + right_half

    # Each object and the one before it in the list (n - 1,): are they of one image, are they alike?
    pair = (image[1:] == image[:-1]) & known[1:] & known[:-1] & ~alone[1:]
    color_pair = pair & color_open[1:]
    same_size = (size[1:] == size[:-1]).astype(int)
    same_color = (color[1:] == color[:-1]).astype(int)

    n_objects = np.bincount(image[known], minlength=len(captions))  # (B,)
    n_large = np.bincount(image[known & (size == 1)], minlength=len(captions))
    large_in_group, group_law = large_of_group(n_objects, n_large)

    n_backgrounds = 1
    if world == 'shapes-open':
        n_backgrounds = len(BACKGROUNDS)
    table = {  # values seen, and their law
        'size': (size[known], uniform(len(RADII))),
        'pairs': (same_size[pair], uniform(2)),
        'color pairs': (same_color[color_pair], np.array([0.75, 0.25])),  # one in four is the same
        'groups': (large_in_group, group_law),
        'position': (quadrant[alone], uniform(4)),
        'color': (color[color_open], uniform(len(COLORS))),
        'shape': (shape[shape_open], uniform(len(SHAPES))),
        'background': (found['background'], uniform(n_backgrounds)),
    }
    return {name: total_variation(values, law) for name, (values, law) in table.items()}


def uniform(n):
    """The law of n equally probable values."""
    return np.full(n, 1 / n)


def large_of_group(n_objects, n_large):
    """How many objects are large in images of three and of four: counts (B,) of all objects and of
    the large ones -> values, 0 to 3 for a group of three and 4 to 8 for a group of four, and their
    law, binomial, as each size is the toss of a coin."""
    in_three = n_large[n_objects == 3]
    in_four = n_large[n_objects == 4]
    values = np.concatenate([in_three, 4 + in_four])
    if len(values) == 0:
        return values, uniform(LONGEST_LAW)
    expected_three = len(in_three) * np.array([1, 3, 3, 1]) / 8
    expected_four = len(in_four) * np.array([1, 4, 6, 4, 1]) / 16
    return values, np.concatenate([expected_three, expected_four]) / len(values)


def total_variation(values, law):
    """Half the sum of |share - probability|: values (n,) ints, law the probabilities of 0, 1, ...
    At most LONGEST_LAW of them."""
    share = np.bincount(values, minlength=LONGEST_LAW) / max(1, len(values))
    probability = np.pad(law, (0, LONGEST_LAW - len(law)))
    return float(abs(share - probability).sum() / 2)


# -----------------------------------------------------------------------------
# The world as a source of data

class Shapes:
    """The shapes world as a source: images with captions, by index. `data` is one of WORLDS, `size`
    the side of the images in pixels, `n_images` how many of them make the data set.
    Every source has the same members, so that no code outside asks which kind it is.
    Raises ValueError if the world cannot be drawn at this size."""

    task_names = TASKS
    judges = True                      # `follows` tells by rules whether an image shows its caption

    def __init__(self, data, size, n_images):
        if size % SIZE:
            possible = max(1, round(size / SIZE)) * SIZE
            raise ValueError(f'the shapes world is drawn at multiples of {SIZE} pixels, '
                             f'not {size}; try --image_size={possible} of tokenizer.py')
        self.data = data
        self.size = size
        self.words = WORDS
        self.caption_length = CAPTION_LENGTH
        self.length = n_images
        self.limit = HELD_OUT          # training may draw any index below: the world has no end
        self.bad = {}                  # {path: reason} of unreadable files; nothing is read here

    def batch(self, index):
        """index (B,) -> images float (B, 3, size, size) in [-1, 1], captions (a list of str)."""
        return draw(index, self.data == 'shapes-open', self.size // SIZE)

    def captions(self, index):
        """index (B,) -> captions alone."""
        choices = random_choices(np.asarray(index, dtype=np.int64))
        return captions_of_scenes(choices, arrange(choices, open_background=False))

    def readable(self, index, n):
        """The first n of the indices: all can be drawn."""
        return index[:n]

    def mirrored(self, caption):
        """What the mirror image shows."""
        return mirrored(caption)

    def key(self):
        """What the content depends on, a list that JSON can hold."""
        return [self.data, self.size]

    def digest(self):
        """What a checkpoint stores of the images: their law has a name."""
        return self.data

    def is_bad(self, i):
        """Could image i not be read?"""
        return False

    def examples(self, n):
        """Indices of at most n held-out images, to look at."""
        spread = np.linspace(0, self.length - 1, min(n, self.length))
        return HELD_OUT + spread.astype(int)

    def training_examples(self, n):
        """Indices of n images that may be trained on."""
        return range(n)

    def test_examples(self, n):
        """Indices of n images that neither training nor the reference of the metrics has seen."""
        return HELD_OUT + 10 ** 6 + np.arange(n)

    def reader_examples(self, n):
        """Indices of n images that neither training nor any metric has seen."""
        return HELD_OUT + 2 ** 30 + np.arange(n)

    def facts(self, index):
        """What the images at index (B,) show, bool (B, facts)."""
        return facts(index, self.data == 'shapes-open')

    def reference_split(self, n):
        """Indices of n images that metrics compare with, of others, and the name of the former."""
        reference = np.arange(HELD_OUT, HELD_OUT + n)
        others = np.arange(HELD_OUT + n, HELD_OUT + 20 * n)
        return reference, others, f'{n} held-out renders'

    def wrong_caption(self, caption, u):
        """A caption in which one fact is not true of the image; three numbers u choose it."""
        return wrong_caption(caption, u)

    def tasks(self, captions):
        """The task of each caption, an array of str. Raises ValueError outside the grammar."""
        return np.array([parse_caption(caption)[0] for caption in captions])

    def follows(self, images, captions):
        """Does each image (B, 3, H, H) show exactly what its caption says? -> bool (B,)."""
        return check(images, captions)

    def factors(self, images, captions):
        """{factor: distance in [0, 1] between what the images show and the world's own law}."""
        return factors(images, captions, self.data)
