from gateway_addon.cli import main

main()
