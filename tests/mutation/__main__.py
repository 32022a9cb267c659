"""`python -m tests.mutation`: workers import `run` by its name, which they cannot do with this."""

from tests.mutation.run import main

raise SystemExit(main())
