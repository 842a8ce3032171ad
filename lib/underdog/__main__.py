"`python -m underdog …` is `underdog …`."
from .console.main import main

if __name__ == '__main__': main()   # not in the processes that it starts
