from gateway_addon.cli import main
from gateway_addon.names import PROGRAM

main(prog_name=PROGRAM)
