"""What every command uses: loading whole or not at all, errors of one line, files written whole."""
