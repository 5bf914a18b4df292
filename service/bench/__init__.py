"""`ldm bench`: the service under load, measured from outside, over HTTP.

    ldm bench                                   the model in the box, on a server of its own, 16 clients
    ldm bench --url http://host:8000            a server that runs already
    ldm bench --rate 2.5 --seconds 60           Poisson arrivals, whether or not answers come
    ldm bench --against-solo --bare             how much the batching gains, and how little HTTP costs
    ldm bench --json run.json --chart run.png   the numbers and the picture of them
    ldm bench --mix mix.toml                    your own requests:

    [[requests]]                # a kind of request; JSON: {"requests": [{...}, ...]}
    weight = 3                  # of all weights: how often it is drawn
    task = "text-to-image"      # or image-to-image or inpainting, if the model does that
    steps = 20                  # steps, guidance_scale, strength: left out, the model's own
    guidance_scale = 1          # 1: none
    n = 1
    width = 1.5                 # times the model's default, to the nearest size that it can make
    height = 1.0

The same --seed draws the same requests. Images a second count from the first request to the last answer, the
emptying at the end included: ask for many more requests than there are clients. Two runs are comparable only
if nothing else used the machine.
"""
