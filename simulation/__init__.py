"""Virtual clients on one machine, on a virtual clock.

::

    runs        the life of a run                   simulator   a hub driven by virtual clients
    population  devices: speed and reliability      traces      devices as they were measured
    computing   from jobs to folded updates         workers     more processes than one
    tiers       which trainer computes a cohort     cohort      many clients at once, or one by one
    fused       plain SGD of many at once           moving      the weights of many meanwhile
    operations  on these weights                    winograd    convolutions by few products
    lanes       threads                             memory      whether a run will fit
    bank        what clients keep                   checkpoint  what a run goes on from
    attacks     what Byzantine clients send         catalog     populations and attacks by name
    stopwatch   where the time goes
"""
