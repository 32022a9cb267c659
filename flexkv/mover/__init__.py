"""Foreign libraries that move bytes, in a process of their own: the mover. (ADR 17)

    engine ── Mover ── MoverLife ═══ socket pair: requests, replies ═══ serving ── MooncakeClient
                           ║                                               ║
                           ╚═════════ window: shared memory, slots ════════╝

A library such as Mooncake may go on writing to the memory that it was given after it has reported
a failure. So it is given the window only, never host memory. A slot of the window is used again
only once the library cannot write to it any more. The end of the process proves that for all slots.
"""
