"""`python -m trl_epo …`, and so `accelerate launch -m trl_epo …`: the command line of `trl_epo.cli`."""

from .cli import main


if __name__ == "__main__":
    main()
