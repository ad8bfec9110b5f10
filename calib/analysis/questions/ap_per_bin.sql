-- AP of every run per bin of training instances, with the number of categories behind each figure.
-- views: results
-- options: bins
--
-- Categories without an object in the split have no AP and are counted in n_absent; those that have objects but were
-- never detected count with their AP of 0, and are counted in n_never_detected too.
WITH binned AS (
    SELECT
        *,
        CASE WHEN instance_count IS NOT NULL THEN 1 + len(list_filter(
            string_split(coalesce(getvariable('bins'), '10,100,1000'), ',')::BIGINT[],
            lambda edge: instance_count >= edge
        )) END AS bin
    FROM results
)
SELECT
    run,
    bin,
    min(instance_count) AS fewest_instances,
    max(instance_count) AS most_instances,
    count(*) FILTER (AP >= 0) AS n,
    avg(AP) FILTER (AP >= 0) AS AP,
    avg(AP50) FILTER (AP50 >= 0) AS AP50,
    avg(AR) FILTER (AR >= 0) AS AR,
    count(*) FILTER (AP >= 0 AND n_det = 0) AS n_never_detected,
    count(*) FILTER (AP < 0) AS n_absent
FROM binned
GROUP BY run, bin
ORDER BY run, bin;
