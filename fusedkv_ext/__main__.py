"""`python -m fusedkv_ext`: the command `fusedkv`, as torchrun starts it with `-m`."""

import sys

from fusedkv_ext.cli import main

sys.exit(main())
