"""`python -m trl_epo.seams`: what differs between the installed TRL and what this package was written for."""

import sys

from .differences import differences, versions


found = differences()
sys.stdout.write("\n".join([f"{versions()}: {len(found) or 'no'} differences", *found]) + "\n")
sys.exit(bool(found))
