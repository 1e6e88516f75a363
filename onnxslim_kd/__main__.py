"""`python -m onnxslim_kd` is the command line."""

from onnxslim_kd.cli import main

if __name__ == "__main__":
    main()
