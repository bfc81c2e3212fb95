"""Many recipes at once, and which of them are worth having: `effc sweep`.

space    what is tried: places of a recipe and their values
work     one trial, in a process of Ray's
drive    gives trials to workers, and keeps what is known on disk after each
front    the trials that no other beats in everything that is asked for
"""
