"""`python -m popax.cli`, where the `popax` script is not on the path."""

import sys

from popax.cli.main import main

sys.exit(main())
