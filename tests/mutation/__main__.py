"""`python -m tests.mutation`; workers import `run` by name, so it is a module of its own."""

from tests.mutation.run import main

raise SystemExit(main())
