"""Pictures of matches, flows and heat maps. No model code.

The `draw_*` functions draw a row for each pair or image. Images are uint8: (B, 3, H, W), or B images (3, H, W) of any
sizes. Point sets are B tensors (n, 2) in pixels of their image, and `titles` has one title for each row.
"""

from corrzoo.visualize.figures import save_figure, to_array
from corrzoo.visualize.flow import draw_flow, flow_colours, write_flo
from corrzoo.visualize.heat import draw_foreground, draw_heat
from corrzoo.visualize.matches import draw_matches
from corrzoo.visualize.warp import draw_warps, flow_warp, tps_warp

__all__ = [
    "draw_flow", "draw_foreground", "draw_heat", "draw_matches", "draw_warps", "flow_colours", "flow_warp",
    "save_figure", "to_array", "tps_warp", "write_flo",
]  # fmt: skip
