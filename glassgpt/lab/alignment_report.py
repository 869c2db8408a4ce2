def chart(result, out): pass
def show(result, console): pass
