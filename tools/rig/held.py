"""held.py LIFELINE_FD COMMAND ...: a command that knows no lifeline, in a process group that ends with ours."""

import subprocess
import sys

from tools.rig.request_log import end_with

end_with(int(sys.argv[1]))
sys.exit(subprocess.call(sys.argv[2:]))
