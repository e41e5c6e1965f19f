from pldr.cli import main

main()
