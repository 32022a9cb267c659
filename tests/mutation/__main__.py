"""`python -m tests.mutation`; `run` is a module of its own because workers import it by name."""

from tests.mutation.run import main

raise SystemExit(main())
