"""
Pictures: grids of images with their captions, in a font that has their letters, and curves.
"""
import contextlib
import functools
import glob
import math
import os
import textwrap

from PIL import Image, ImageDraw, ImageFont

from common.images import one_line
from common.run import say, writing

NOTED = set()                  # captions without a font of which a note has told already

FONT_FOLDERS = ('/usr/share/fonts', '/usr/local/share/fonts', '~/.fonts', '~/.local/share/fonts',
                '/System/Library/Fonts', '/Library/Fonts', '~/Library/Fonts', 'C:/Windows/Fonts')
LETTER = 9                     # height of a caption's letters in pixels
NO_LETTER = '\U0010fffe'       # every font shows its sign for a missing glyph


def save_grid(path, images, captions=(), columns=8):
    """Images (n, 3, H, W) in [-1, 1] -> one PNG, `columns` per row, each with its caption below if
    captions are given. One that no font here can write is a number, of which a note tells."""
    images = images.detach().float().cpu().clamp(-1, 1)
    pixels = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()   # (n, H, W, 3)
    n, H, W, _ = pixels.shape
    columns = min(columns, n)
    scale = math.ceil(96 / W)                                  # tiles with room for captions
    gap = 4
    room = 30 if len(captions) else 0                          # three lines of text
    width = W * scale + gap
    height = H * scale + gap + room
    rows = math.ceil(n / columns)
    sheet = Image.new('RGB', (columns * width, rows * height), 'white')
    pen = ImageDraw.Draw(sheet)
    unwritten = {}
    for k, array in enumerate(pixels):
        x = k % columns * width
        y = k // columns * height
        tile = Image.fromarray(array).resize((W * scale, H * scale), Image.Resampling.NEAREST)
        sheet.paste(tile, (x, y))
        if len(captions):
            caption = one_line(captions[k])
            font = font_for(caption)
            if font is None:
                caption = unwritten.setdefault(caption, f'[{k}]')
                font = built_in_font()
            letter = 6 if font is built_in_font() else LETTER  # about so many pixels wide
            lines = textwrap.wrap(caption, width // letter)
            text = '\n'.join(lines[:3])
            pen.text((x, y + tile.height + 1), text, fill='black', font=font, spacing=0)
    note_unwritten(unwritten)
    with writing(path):
        sheet.save(path)


def note_unwritten(unwritten):
    """Print which captions {caption: number} a grid shows as numbers, each set of them once."""
    key = tuple(unwritten.items())
    if unwritten and key not in NOTED:
        NOTED.add(key)
        legend = ', '.join(f'{number} {textwrap.shorten(caption, 60)}' for caption, number in key)
        say(f'note: no font here has the letters of {len(unwritten)} captions, which are numbers in grids: {legend}')


@functools.cache
def built_in_font():
    return ImageFont.load_default(LETTER)


@functools.cache
def font_for(text):
    """The first font that has all letters of a text: the built-in one, then those of the system;
    None where there is none."""
    letters = set(text) - {' '}
    if has_letters(built_in_font(), letters):
        return built_in_font()
    for font in system_fonts():                                # read only where they are needed
        if has_letters(font, letters):
            return font
    return None


def has_letters(font, letters):
    """None of them is drawn as the sign for a missing one."""
    absent = bytes(font.getmask(NO_LETTER))
    return all(bytes(font.getmask(letter)) != absent for letter in letters)


@functools.cache
def system_fonts():
    """The readable fonts in the usual folders, upright ones of common weight first."""
    fonts = []
    for folder in FONT_FOLDERS:
        pattern = os.path.join(os.path.expanduser(folder), '**', '*.[to]t[fc]')
        for path in sorted(glob.glob(pattern, recursive=True)):
            with contextlib.suppress(OSError, ValueError):     # a font that PIL cannot read
                fonts.append(ImageFont.truetype(path, LETTER))
    return sorted(fonts, key=is_styled)


def is_styled(font):
    family, style = font.getname()
    return style not in ('Regular', 'Book', 'Roman')


def save_curve(path, curves, label):
    """{name: [(passes, value)]}, at most four -> a PNG with one line each, `label` above."""
    W, H = 560, 360
    left, right, top, bottom = 60, 20, 30, 50                  # margins
    colors = ('crimson', 'royalblue', 'seagreen', 'black')
    xs = [x for line in curves.values() for x, y in line]
    ys = [y for line in curves.values() for x, y in line]
    x_min = min(xs)
    y_min = min(ys)
    x_span = max(max(xs), x_min + 1e-6) - x_min                # never 0
    y_span = max(max(ys), y_min + 1e-6) - y_min

    def place(x, y):
        """A point of the curve -> pixels; the picture's rows count downwards."""
        return (left + (x - x_min) / x_span * (W - left - right),
                H - bottom - (y - y_min) / y_span * (H - top - bottom))

    sheet = Image.new('RGB', (W, H), 'white')
    pen = ImageDraw.Draw(sheet)
    pen.rectangle((left, top, W - right, H - bottom), outline='gray')
    for k in range(5):                                         # numbers at both axes
        x = x_min + k / 4 * x_span
        y = y_min + k / 4 * y_span
        column, row = place(x, y)
        pen.text((column - 8, H - bottom + 6), f'{x:.0f}', fill='black')
        pen.text((16, row - 6), f'{y:.3f}', fill='black')
    pen.text((W // 2 - 120, H - 24), 'network-plus-decoder passes per image', fill='black')
    pen.text((left + 2, 12), label, fill='black')
    for k, (name, color) in enumerate(zip(curves, colors)):
        points = [place(x, y) for x, y in curves[name]]
        pen.line(points, fill=color, width=2)
        pen.text((W - 200, H - 110 + 14 * k), name, fill=color)
    with writing(path):
        sheet.save(path)
