"""A small Anima that draws, for trying things out and for tests, without a download or a graphics card.

`write_miniature` copies the trained one that comes with the package; `write_random_miniature` makes one of random
weights.
"""

from .drawing import BACKGROUNDS, COLOURS, SHAPES, Scene
from .exams import Question, base_exam, draw_exam, figure_exam, figure_set, style_exam, style_set
from .layout import MiniatureFiles, miniature_files
from .random_weights import native_state_dict, scenes, wan_state_dict, write_random_miniature
from .scoring import Score, judge, score
from .trained import write_miniature

__all__ = [
    "BACKGROUNDS",
    "COLOURS",
    "SHAPES",
    "MiniatureFiles",
    "Question",
    "Scene",
    "Score",
    "base_exam",
    "draw_exam",
    "figure_exam",
    "figure_set",
    "judge",
    "miniature_files",
    "native_state_dict",
    "scenes",
    "score",
    "style_exam",
    "style_set",
    "wan_state_dict",
    "write_miniature",
    "write_random_miniature",
]
