"""`python -m fusedkv_ext`: the command `fusedkv`, as torchrun starts it with `-m`."""

import os
import sys
from typing import cast

from fusedkv_ext.cli.main import main


def _run() -> object:
    try:
        return main()
    except SystemExit as exit_:  # of a process whose error another one has said
        return exit_.code


code = _run()
if int(os.environ.get("WORLD_SIZE", "1")) > 1:
    # Caches of DTensor keep process groups, and with them threads of gloo, beyond destroy_process_group. One
    # that frees a tensor while Python ends aborts the process (terminate called without an active exception).
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)
sys.exit(cast("int | str | None", code))
