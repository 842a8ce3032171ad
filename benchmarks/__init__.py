"Side-by-side measurements, each one command with JSON on its last line."
