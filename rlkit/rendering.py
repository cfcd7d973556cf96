"""Pictures without a display.

MuJoCo draws through one of several libraries, which it reads from `MUJOCO_GL` when it is imported. Whether one works is
found out in a process of its own, since a wrong one may end the process that tries it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache

LIBRARIES = ("egl", "osmesa")
"""OpenGL without a display, the faster one first."""
PATIENCE = 10.0  # seconds for one library

_DRAW = """
import mujoco
model = mujoco.MjModel.from_xml_string("<mujoco><worldbody><geom size='1'/></worldbody></mujoco>")
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
with mujoco.Renderer(model, 8, 8) as renderer:
    renderer.update_scene(data)
    print(renderer.render().shape)
"""


def has_display() -> bool:
    """Whether windows can be opened; macOS and Windows draw without our help."""
    return not sys.platform.startswith("linux") or any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY"))


@cache
def works(library: str) -> bool:
    """Whether MuJoCo can draw a picture with this value of `MUJOCO_GL`, in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DRAW],
            env={**os.environ, "MUJOCO_GL": library},
            capture_output=True,
            timeout=PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and b"(8, 8, 3)" in done.stdout


def prepare() -> None:
    """Let environments of this process draw without a display. What the user has set, and a display, are left alone."""
    if has_display():
        return
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # of pygame, which draws classic control
    if "MUJOCO_GL" not in os.environ:
        library = next((name for name in LIBRARIES if works(name)), None)
        if library is not None:
            os.environ["MUJOCO_GL"] = library


def describe() -> str:
    """How environments of this machine would draw, for people."""
    chosen = os.environ.get("MUJOCO_GL")
    if chosen is not None:
        return f"MUJOCO_GL={chosen} {'works' if works(chosen) else 'does not work'}"
    if has_display():
        return "a display"
    working = [name for name in LIBRARIES if works(name)]
    if working:
        return f"without a display, MuJoCo by {working[0]}"
    return "MuJoCo's environments cannot be drawn: neither EGL (libegl1) nor OSMesa (libosmesa6) works"
