"""x."""
class Recorder:
    def __init__(self,*a): pass
    def record(self, r): pass
    def close(self): pass
