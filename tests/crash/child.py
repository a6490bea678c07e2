"""The process that is ended: `python child.py SCENE BASE OUT` forks a child for every call, which dies before it.

OUT/<number> is what the child left that died before call <number>; OUT/<number>-torn the same with half of the bytes of
that write. The last one lives: its operation is acknowledged. On stdout: the folders' names, a JSON list, in order.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from crash.disk import watched
from crash.scenes import SCENES, Scene
from lorashelf import atomic

DIED, DIED_WRITING = 9, 10


def run_until(scene: Scene, root: Path, number: int, torn: bool = False) -> int:
    """Run in a child that dies before call `number` (from 0), or in the middle of this write; its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def before(count: int, name: str, arguments: tuple[Any, ...]) -> None:
        if count == number:
            if torn:
                os.write(arguments[0], arguments[1][: len(arguments[1]) // 2])
            os._exit(DIED_WRITING if name == "write" else DIED)

    try:
        with watched(root, before=before):
            scene.run(root)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def in_place(path: Path, data: bytes, staging: Path) -> None:
    """What atomic.replace_file must not be: the twin that the tests have to catch."""
    handle = atomic.os.open(path, os.O_WRONLY | os.O_TRUNC)
    atomic.os.write(handle, data)
    atomic.os.fsync(handle)
    atomic.os.close(handle)


def main(scene: Scene, base: Path, out: Path) -> int:
    left: list[str] = []
    for number in itertools.count():
        shutil.copytree(base, out / f"{number}")
        status = run_until(scene, out / f"{number}", number)
        left.append(f"{number}")
        if status == DIED_WRITING:
            shutil.copytree(base, out / f"{number}-torn")
            run_until(scene, out / f"{number}-torn", number, torn=True)
            left.append(f"{number}-torn")
        elif status != DIED:
            break
    print(json.dumps(left))
    return status


if __name__ == "__main__":
    if "--in-place" in sys.argv:
        sys.argv.remove("--in-place")
        atomic.replace_file = in_place
    sys.exit(main(SCENES[sys.argv[1]], Path(sys.argv[2]), Path(sys.argv[3])))
