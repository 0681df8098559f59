from lorapar_cli.app import main

main()
